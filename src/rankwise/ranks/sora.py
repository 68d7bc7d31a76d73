"""SoRA: LoRA with a gate on each direction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from peft import LoraConfig
from peft.tuners.lora.layer import Embedding, LoraLayer
from torch import Tensor, nn

from rankwise.directions.triplets import Part, check_part
from rankwise.directions.variants import SpectralVariant, embedded
from rankwise.errors import UserError
from rankwise.peft_bridge import (
    Kind,
    LowRankVariant,
    active_adapter,
    adapted_layers,
    check_alphas,
    check_config,
    keep_state,
    register,
)
from rankwise.peft_bridge.matrices import along, expand, factor_matrices, project
from rankwise.peft_bridge.tuner import VariantModel

GATE = "lora_gate"


@dataclass
class SoraConfig(LoraConfig):
    """A ``peft.LoraConfig`` with a gate g on the r directions: ``h = W x + s B (g * (A x))``.

    Train with :func:`rankwise.sora_optimizer`, then :func:`rankwise.prune`. With a ``part`` the directions are those of
    a part of the weight's spectrum, as in :class:`rankwise.MiloraConfig`, and the layer computes ``W x + s (B diag(g) A
    - B0 diag(g) A0) x``: the base at the start, and again where g is zero.

    Args:
        r: the largest rank.
        threshold: of the proximal step after each optimizer step; 0 or more, in units of the gate, not multiplied by
            the learning rate (as in the paper's code; the paper's lambda is threshold / learning rate).
        l1: weight of the mean of |g| in the loss; 0 or more.
        gate_init: ``normal`` (standard normal, as in the paper's code) or ``ones``.
            With a ``part``, ``ones`` lets every direction count as in MiLoRA.
        mode: ``proximal`` (the exact step) or ``reference`` (the paper's code; see ``published_step``).
        part: ``minor``, ``principal``, ``middle`` or ``random``: start from these directions of each weight; ``None``
            (default) for LoRA's own start.
        part_seed: of the draw where part is ``random``.
        lora_alpha: with a ``part`` it defaults to ``r``, else to PEFT's 8.

    Raises:
        UserError: a value out of its range, or a setting of another LoRA variant (``use_dora``, say). When the model is
            adapted: as for :class:`rankwise.MiloraConfig`.

    Source: SoRA (arXiv 2311.11696), section 3.
    """

    threshold: float = field(default=3e-4, metadata={"help": "Threshold of the proximal step, in units of the gate."})
    l1: float = field(default=10.0, metadata={"help": "Weight of mean |g| in the loss."})
    gate_init: Literal["normal", "ones"] = field(default="normal", metadata={"help": "normal or ones."})
    mode: Literal["proximal", "reference"] = field(default="proximal", metadata={"help": "proximal or reference."})
    lora_alpha: int | float | None = field(
        default=None, metadata={"help": "Scaling numerator; where it is not given, r with a part, else 8."}
    )
    part: Part | None = field(default=None, metadata={"help": "Part of the spectrum to start from; none for LoRA's."})
    part_seed: int = field(default=0, metadata={"help": "Seed of the draw where part is random."})

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name in ("threshold", "l1"):
            if not getattr(self, name) >= 0:
                raise UserError(f"SoraConfig({name}={getattr(self, name)}) is not possible: it must be 0 or more")
        for name, known in {"gate_init": ("normal", "ones"), "mode": ("proximal", "reference")}.items():
            if getattr(self, name) not in known:
                raise UserError(f"SoraConfig({name}={getattr(self, name)!r}) is unknown: {' or '.join(known)}")
        check_config(self, starts=(True, False, "gaussian") if self.part is None else (True, False))
        self._check_part()
        self.peft_type = Kind.SORA

    def _check_part(self) -> None:
        """Check the part and fill in alpha."""
        if self.part is not None:
            check_part(self.part)
        if self.lora_alpha is None:
            self.lora_alpha = self.r if self.part is not None else LoraConfig.lora_alpha
        check_alphas(self)


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
        dropped = x if isinstance(module, Embedding) else module.lora_dropout[active_adapter](x)
        gated = along(module, project(module, dropped, a), getattr(module, GATE)[active_adapter])
        update: Tensor = expand(module, gated, b) * module.scaling[active_adapter]
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


def gates(model: nn.Module) -> dict[str, nn.Parameter]:
    """The gates of the active adapter, (rank,) each, by the name of their layer in the base model.

    Raises:
        UserError: the active adapter is not SoRA.
    """
    adapter = active_adapter(model)
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
    """What the gates of the active adapter leave: open gates, all gates, and parameters once the rest is pruned."""
    adapter = active_adapter(model)
    layers = dict(adapted_layers(model, adapter))
    left = {name: int((gate != 0).sum()) for name, gate in gates(model).items()}
    total = sum(gate.numel() for gate in gates(model).values())
    parameters = sum(count * direction_size(layers[name], adapter) for name, count in left.items())
    return {"gates_left": sum(left.values()), "gates": total, "parameters_left": parameters}


register(Kind.SORA, SoraConfig, SoraModel)
