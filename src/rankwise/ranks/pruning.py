"""Dropping the directions that SoRA's gates have closed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import LoraConfig
from torch import nn
from torch.optim import Optimizer

from rankwise.peft_bridge import active_adapter, adapted_layers
from rankwise.ranks.resizing import kept_parameters, resize_adapter
from rankwise.ranks.sora import gates


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
    live = live_directions(model)
    removed = resize_adapter(model, live, optimizer=optimizer)
    ranks = {name: int(mask.sum()) for name, mask in live.items()}
    return PruneReport(ranks, removed, before, kept_parameters(dict(adapted_layers(model, adapter)).values(), adapter))


def live_directions(model: nn.Module) -> dict[str, torch.Tensor]:
    """Which directions of each layer are to stay: those with an open gate, and one where a layer has to keep one."""
    live = {name: gate.detach() != 0 for name, gate in gates(model).items()}
    config: LoraConfig = model.peft_config[active_adapter(model)]  # type: ignore[index]
    if config.bias != "none" or not any(mask.any() for mask in live.values()):
        for mask in list(live.values()) if config.bias != "none" else [next(iter(live.values()))]:
            mask[0] |= not mask.any()
    return live
