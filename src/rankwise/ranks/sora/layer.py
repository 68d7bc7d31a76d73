"""SoRA: LoRA with a gate on each direction."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig
from peft.tuners.lora.layer import Embedding, LoraLayer, _ConvNd
from torch import Tensor, nn

from rankwise.directions.variants import SpectralVariant, embedded
from rankwise.errors import UserError
from rankwise.peft_bridge import Kind, LowRankVariant, active_adapter, adapted_layers, keep_state, register
from rankwise.peft_bridge.matrices import along, expand, factor_matrices, project
from rankwise.peft_bridge.tuner import VariantModel
from rankwise.ranks.resizing import GATE, resize_adapter
from rankwise.ranks.sora.config import SoraConfig
from rankwise.ranks.sora.gated import add_gated


class GateVariant(LowRankVariant):
    """The update s B diag(g) A."""

    def attach(self, layer: LoraLayer, adapter: str, config: LoraConfig) -> None:
        """Make the gate, on the device of A and in its dtype."""
        assert isinstance(config, SoraConfig)
        gate = torch.ones_like(factor_matrices(layer, adapter)[1][:, 0])
        if config.gate_init == "normal" and not gate.is_meta:
            gate.normal_()
        keep_state(layer, GATE, adapter, nn.Parameter(gate))

    def factors(self, layer: LoraLayer, adapter: str) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]:
        """B diag(g) and A, over the live directions only."""
        gate = getattr(layer, GATE)[adapter].detach()
        live = gate != 0
        b, a = (factor.detach() for factor in factor_matrices(layer, adapter))
        return b[:, live] * gate[live], a[live]

    def set_update(self, layer: LoraLayer, adapter: str, b: Float[Tensor, "out k"], a: Float[Tensor, "k in"]) -> None:
        """As the base class's; the gate is one."""
        super().set_update(layer, adapter, b, a)
        getattr(layer, GATE)[adapter] = nn.Parameter(torch.ones_like(a[:, 0]), requires_grad=False)

    def forward(self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """PEFT's hook: the layer's output with the update added."""
        b, a = factor_matrices(module, active_adapter)
        gate, scaling = getattr(module, GATE)[active_adapter], module.scaling[active_adapter]
        dropped = x if isinstance(module, Embedding) else module.lora_dropout[active_adapter](x)
        if not isinstance(module, Embedding | _ConvNd):
            return add_gated(result, dropped, a, b, gate, scaling)
        update: Tensor = expand(module, along(module, project(module, dropped, a), gate), b) * scaling
        return result + update


class SpectralGateVariant(SpectralVariant):
    """Gates over spectral directions: the update s sum_i g_i (b_i a_i - b0_i a0_i).

    Computed as s ((B - B0) diag(g) A + B0 diag(g) (A - A0)): exactly zero at the start, whatever the gate is. A
    direction whose gate is zero is the pretrained one again.
    """

    def attach(self, layer: LoraLayer, adapter: str, config: LoraConfig) -> None:
        """Make the gate, and keep room for a frozen copy of A and B."""
        GateVariant().attach(layer, adapter, config)
        super().attach(layer, adapter, config)

    def set_update(self, layer: LoraLayer, adapter: str, b: Float[Tensor, "out k"], a: Float[Tensor, "k in"]) -> None:
        """As the base class's; the gate is one and the frozen pair zero."""
        super().set_update(layer, adapter, b, a)
        getattr(layer, GATE)[adapter] = nn.Parameter(torch.ones_like(a[:, 0]), requires_grad=False)

    def factors(self, layer: LoraLayer, adapter: str) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]:
        """[(B - B0) diag(g), B0 diag(g)] and [A; A - A0], over the live directions only."""
        b, a = super().factors(layer, adapter)
        gate = getattr(layer, GATE)[adapter].detach().repeat(2)
        live = gate != 0
        return b[:, live] * gate[live], a[live]

    def forward(self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """PEFT's hook: the layer's output with the update added."""
        pairs = self.pairs(module, active_adapter)
        b, a = pairs.stacked()
        if isinstance(module, Embedding):
            hidden = embedded(module, x, pairs)
        else:
            hidden = project(module, module.lora_dropout[active_adapter](x), a)
        gated = along(module, hidden, getattr(module, GATE)[active_adapter].repeat(2))
        update: Tensor = expand(module, gated, b) * module.scaling[active_adapter]
        return result + update


class SoraModel(VariantModel):
    """PEFT's tuner for :class:`SoraConfig`."""

    def make_variant(self, config: LoraConfig) -> LowRankVariant:
        """With a part of the spectrum to start from, or without."""
        assert isinstance(config, SoraConfig)
        return GateVariant() if config.part is None else SpectralGateVariant()

    def _start(self, model: nn.Module, adapter: str) -> None:
        """Note how large the adapter is at first, and check its budget, before any first value is computed.

        An adapter that is given another one's config object gets a copy: what is noted in it differs from then on.
        """
        config = self.peft_config[adapter]
        shared = any(one is config for name, one in self.peft_config.items() if name != adapter)
        if not shared and not config.first_state_known:
            note_first_state(config, dict(adapted_layers(model, adapter)), adapter)
        config.first_state_known = False  # that was of the adapter that is made here
        super()._start(model, adapter)
        if shared:
            self.peft_config[adapter] = copy.copy(config)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SoraConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's hook: a checkpoint of an adapter that was cut while it trained has smaller ranks."""
        fit_ranks(model, adapter_name, state_dict)
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        return remapped


def fit_ranks(model: nn.Module, adapter: str, state: Mapping[str, Tensor]) -> None:
    """Cut an adapter down to the ranks of a checkpoint whose closed directions were cut while it trained.

    Raises:
        UserError: the checkpoint has more directions than the adapter.
    """
    layers = dict(adapted_layers(model, adapter))
    saved = {
        re.sub(rf"^base_model\.model\.|\.{GATE}$", "", key): len(gate) for key, gate in state.items() if GATE in key
    }
    if not saved.keys() & layers.keys():
        return
    kept = {name: torch.arange(layer.r[adapter]) < saved.get(name, 0) for name, layer in layers.items()}
    for name, layer in layers.items():
        if saved.get(name, 0) > layer.r[adapter]:
            raise UserError(
                f"{name}: the checkpoint has {saved[name]} directions, this adapter {layer.r[adapter]}: it was begun "
                "with another r, or was cut since; call rankwise.ranks.match_ranks(model, folder) first, or load the "
                "checkpoint with PeftModel.from_pretrained on the base"
            )
    cut = {name: mask for name, mask in kept.items() if not mask.all()}
    if cut:
        count = sum(int((~mask).sum()) for mask in cut.values())
        warnings.warn(f"{count} directions in {len(cut)} layers are not in the checkpoint: they are cut", stacklevel=2)
        resize_adapter(model, cut, adapter=adapter)


def note_first_state(config: SoraConfig, layers: Mapping[str, LoraLayer], adapter: str) -> None:
    """Fill in the gates and parameters that an adapter begins with, and the target of its budget.

    Raises:
        UserError: a budget above that, or below the least that can be left.
    """
    sizes = {name: direction_size(layer, adapter) for name, layer in layers.items()}
    config.initial_gates = sum(layer.r[adapter] for layer in layers.values())
    first = config.initial_parameters = sum(size * layers[name].r[adapter] for name, size in sizes.items())
    config.budget = config.parameters_to_keep()
    least = min(sizes.values()) if config.bias == "none" else sum(sizes.values())
    if config.budget is not None and not least <= config.budget <= first:
        raise UserError(
            f"a budget of {config.budget:,} parameters is not possible: {least:,} (the smallest that an "
            f"adapter can be here) to {first:,} (all at r={config.r}) are"
        )


def gates(model: nn.Module, adapter: str | None = None) -> dict[str, nn.Parameter]:
    """The gates of an adapter, the active one by default, (rank,) each, by the name of their layer in the base model.

    Raises:
        UserError: the adapter is not SoRA.
    """
    adapter = active_adapter(model) if adapter is None else adapter
    found = {
        name: getattr(layer, GATE)[adapter]
        for name, layer in adapted_layers(model, adapter)
        if hasattr(layer, GATE) and adapter in getattr(layer, GATE)
    }
    if not found:
        kind = type(model.peft_config[adapter]).__name__  # type: ignore[index]
        raise UserError(f"adapter {adapter!r} has no gates ({kind}): make it with rankwise.SoraConfig")
    return found


def direction_size(layer: LoraLayer, adapter: str) -> int:
    """Trained numbers of one direction: a column of B, a row of A and the gate."""
    b, a = factor_matrices(layer, adapter)
    return b.shape[0] + a.shape[1] + 1


def gate_counts(model: nn.Module) -> dict[str, int]:
    """What the gates of the active adapter leave: open gates, all that there were at first, and parameters left."""
    adapter = active_adapter(model)
    config: SoraConfig = model.peft_config[adapter]  # type: ignore[index, assignment]
    layers = dict(adapted_layers(model, adapter))
    left = {name: int((gate != 0).sum()) for name, gate in gates(model).items()}
    total = config.initial_gates or sum(gate.numel() for gate in gates(model).values())
    parameters = sum(count * direction_size(layers[name], adapter) for name, count in left.items())
    return {"gates_left": sum(left.values()), "gates": total, "parameters_left": parameters}


register(Kind.SORA, SoraConfig, SoraModel)
