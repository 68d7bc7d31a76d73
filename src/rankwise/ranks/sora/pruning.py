"""Dropping the directions that SoRA's gates have closed."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from peft import LoraConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from rankwise.peft_bridge import active_adapter, adapted_layers
from rankwise.ranks.resizing import kept_parameters, resize_adapter
from rankwise.ranks.sora.config import SoraConfig
from rankwise.ranks.sora.layer import gates

Choice = dict[str, Bool[Tensor, " _"]]


@dataclass(frozen=True)
class PruneReport:
    """What pruning left.

    Attributes:
        ranks: rank left by layer, 0 where the layer's adapter was removed.
        removed: names of the layers whose adapter was removed.
        parameters_before: adapter parameters (A, B and gates) before.
        parameters: adapter parameters after.
    """

    ranks: dict[str, int]
    removed: tuple[str, ...]
    parameters_before: int
    parameters: int


@torch.no_grad()
def prune(model: nn.Module, optimizer: Optimizer | None = None) -> PruneReport:
    """Drop every direction whose gate is exactly zero from A, B and the gate; the function stays the same.

    A layer left without a direction loses its adapter and computes its base again. (PEFT needs one adapted layer: where
    all are dead, the first keeps one dead direction. So does each layer where biases are trained beside it.) The
    config's ``rank_pattern``, ``alpha_pattern`` and ``target_modules`` follow, so that the pruned adapter saves and
    loads as usual. ``rankwise.export`` folds the gates into B and writes plain LoRA.

    Args:
        model: a PEFT model whose active adapter is SoRA.
        optimizer: one that goes on with the model: its state is cut too. Without it, make a new one.

    Raises:
        UserError: the active adapter is not SoRA, it is merged, or the optimizer's state cannot be cut.
    """
    adapter = active_adapter(model)
    before = kept_parameters(dict(adapted_layers(model, adapter)).values(), adapter)
    opened = {name: gate.detach() != 0 for name, gate in gates(model).items()}
    _warn_of_nothing_closed(model, adapter, opened)
    live = keep_least(model, adapter, opened)
    removed = resize_adapter(model, live, optimizer=optimizer)
    ranks = {name: int(mask.sum()) for name, mask in live.items()}
    return PruneReport(ranks, removed, before, kept_parameters(dict(adapted_layers(model, adapter)).values(), adapter))


def _warn_of_nothing_closed(model: nn.Module, adapter: str, opened: Choice) -> None:
    """Warn where every gate there ever was is open: nothing will be smaller."""
    config: SoraConfig = model.peft_config[adapter]  # type: ignore[index, assignment]
    left = sum(int(mask.sum()) for mask in opened.values())
    if left == config.initial_gates and config.parameters_to_keep() != config.initial_parameters:
        warnings.warn(
            f"none of {left} gates is closed, so nothing is pruned: only steps of rankwise.sora_optimizer close them, "
            "and a budget or a threshold has to be small enough",
            stacklevel=3,
        )


def keep_least(
    model: nn.Module, adapter: str, live: dict[str, Bool[Tensor, " rank"]]
) -> dict[str, Bool[Tensor, " rank"]]:
    """The same choice of directions with one more in each layer that has none and must not lose its adapter.

    That is every layer where biases are trained beside it, and the first one where no layer has any.
    """
    config: LoraConfig = model.peft_config[adapter]  # type: ignore[index]
    bound = list(live)
    if config.bias == "none":
        bound = [] if any(mask.any() for mask in live.values()) else bound[:1]
    first = {name: torch.arange(len(mask), device=mask.device) == 0 for name, mask in live.items()}
    return {name: first[name] if name in bound and not mask.any() else mask for name, mask in live.items()}
