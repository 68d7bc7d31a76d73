"""Cut the directions whose gate is zero out of a SoRA adapter: smaller matrices, the same function."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from rankwise.directions.variants import START
from rankwise.peft_bridge import active_adapter, adapted_layers, pattern_keys, target_modules
from rankwise.peft_bridge.matrices import factor_matrices, set_factors
from rankwise.ranks.sora import GATE, SoraConfig, gates


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
def prune(model: nn.Module) -> PruneReport:
    """Drop every direction whose gate is exactly zero from A, B and the gate; the function stays the same.

    A layer left without a direction loses its adapter and computes its base again. (PEFT needs one adapted layer: where
    all are dead, the first keeps one dead direction. So does each layer where biases are trained beside it.) The
    config's ``rank_pattern``, ``alpha_pattern`` and ``target_modules`` follow, so that the pruned adapter saves and
    loads as usual. Make a new optimizer afterwards: the parameters are new.

    Raises:
        UserError: the active adapter is not SoRA.
    """
    live = {name: gate.detach() != 0 for name, gate in gates(model).items()}
    before = sum(p.numel() for p in _adapter_parameters(model))
    adapter = active_adapter(model)
    biases = model.peft_config[adapter].bias != "none"  # type: ignore[union-attr, index]
    if biases or not any(mask.any() for mask in live.values()):
        _keep_one(list(live.values()) if biases else [next(iter(live.values()))])
    layers = dict(adapted_layers(model, adapter))
    for name, mask in live.items():
        if mask.any():
            _cut(layers[name], adapter, mask)
        else:
            _remove(model, name, adapter)
    kept = {name: int(mask.sum()) for name, mask in live.items()}
    _update_config(model, adapter, kept)
    removed = tuple(name for name, rank in kept.items() if rank == 0)
    return PruneReport(kept, removed, before, sum(p.numel() for p in _adapter_parameters(model)))


def _keep_one(masks: list[torch.Tensor]) -> None:
    for mask in masks:
        mask[0] |= not mask.any()


def _adapter_parameters(model: nn.Module) -> list[torch.Tensor]:
    """A, B (as matrices) and the gate of each layer; a frozen pair is not counted, since it is not trained."""
    adapter = active_adapter(model)
    found = []
    for _, layer in adapted_layers(model, adapter):
        found += [*factor_matrices(layer, adapter), getattr(layer, GATE)[adapter]]
    return found


def _cut(layer: LoraLayer, adapter: str, live: torch.Tensor) -> None:
    """Keep the live rows of A, columns of B and entries of the gate, of the frozen pair too; the scaling stays."""
    gate = getattr(layer, GATE)
    b, a = factor_matrices(layer, adapter)
    set_factors(layer, adapter, b[:, live], a[live])
    gate[adapter] = nn.Parameter(gate[adapter][live].clone(), requires_grad=gate[adapter].requires_grad)
    if adapter in getattr(layer, START, {}):
        pair = getattr(layer, START)[adapter]
        pair.set(pair.A.flatten(1)[live], pair.B.flatten(1)[:, live])


def _remove(model: nn.Module, name: str, adapter: str) -> None:
    """Delete the adapter from its layer; a layer without any adapter becomes its base layer again."""
    assert isinstance(model, PeftModel)
    parent_name, _, child = name.rpartition(".")
    parent = model.get_base_model().get_submodule(parent_name)
    layer = getattr(parent, child)
    if len(layer.r) > 1:
        # Where the active adapter is deleted PEFT activates another one, which would change the function.
        active = list(layer.active_adapters)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer.delete_adapter(adapter)
        layer.set_adapter(active)
    else:
        setattr(parent, child, layer.get_base_layer())


def _update_config(model: nn.Module, adapter: str, ranks: dict[str, int]) -> None:
    """State each layer's rank, and the alpha that gives the same scaling at that rank."""
    config: SoraConfig = model.peft_config[adapter]  # type: ignore[index, assignment]
    root = math.sqrt if config.use_rslora else float
    kept = {name: rank for name, rank in ranks.items() if rank}
    for name, layer in adapted_layers(model, adapter):
        layer.lora_alpha[adapter] = layer.scaling[adapter] * root(kept[name])
    layers = dict(adapted_layers(model, adapter))
    keys = pattern_keys(model, kept)
    config.target_modules = target_modules(model, kept)
    config.rank_pattern = {keys[name]: rank for name, rank in kept.items()}
    config.alpha_pattern = {keys[name]: layers[name].lora_alpha[adapter] for name in kept}
