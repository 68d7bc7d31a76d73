"""SoRA: LoRA with a gate on each direction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from rankwise.errors import UserError
from rankwise.peft_bridge import (
    LowRankVariant,
    VariantModel,
    active_adapter,
    adapted_layers,
    check_config,
    keep_state,
    register,
)

GATE = "lora_gate"


@dataclass
class SoraConfig(LoraConfig):
    """A ``peft.LoraConfig`` with a gate g on the r directions: ``h = W x + s B (g * (A x))``.

    Train with :func:`rankwise.sora_optimizer`, then :func:`rankwise.prune`.

    Args:
        r: the largest rank.
        threshold: of the proximal step after each optimizer step; 0 or more, in units of the gate, not multiplied by
            the learning rate (as in the paper's code; the paper's lambda is threshold / learning rate).
        l1: weight of the mean of |g| in the loss; 0 or more.
        gate_init: ``normal`` (standard normal, as in the paper's code) or ``ones``.
        mode: ``proximal`` (the exact step) or ``reference`` (the paper's code; see ``published_step``).

    Raises:
        UserError: a value out of its range, or a setting of another LoRA variant (``use_dora``, say).

    Source: SoRA (arXiv 2311.11696), section 3.
    """

    threshold: float = field(default=3e-4, metadata={"help": "Threshold of the proximal step, in units of the gate."})
    l1: float = field(default=10.0, metadata={"help": "Weight of mean |g| in the loss."})
    gate_init: Literal["normal", "ones"] = field(default="normal", metadata={"help": "normal or ones."})
    mode: Literal["proximal", "reference"] = field(default="proximal", metadata={"help": "proximal or reference."})

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name in ("threshold", "l1"):
            if not getattr(self, name) >= 0:
                raise UserError(f"SoraConfig({name}={getattr(self, name)}) is not possible: it must be 0 or more")
        for name, known in {"gate_init": ("normal", "ones"), "mode": ("proximal", "reference")}.items():
            if getattr(self, name) not in known:
                raise UserError(f"SoraConfig({name}={getattr(self, name)!r}) is unknown: {' or '.join(known)}")
        check_config(self)
        self.peft_type = "SORA"


class GateVariant(LowRankVariant):
    """The update s B diag(g) A."""

    def attach(self, layer: Linear, adapter: str, config: LoraConfig) -> None:
        """Make the gate, on the device of A and in its dtype."""
        assert isinstance(config, SoraConfig)
        gate = torch.ones_like(layer.lora_A[adapter].weight[:, 0])
        if config.gate_init == "normal" and not gate.is_meta:
            gate.normal_()
        keep_state(layer, GATE, adapter, nn.Parameter(gate))

    def factors(self, layer: Linear, adapter: str) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]:
        """B diag(g) and A, over the live directions only."""
        gate = getattr(layer, GATE)[adapter].detach()
        live = gate != 0
        b, a = layer.lora_B[adapter].weight.detach(), layer.lora_A[adapter].weight.detach()
        return b[:, live] * gate[live], a[live]

    def forward(self, module: Linear, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """PEFT's hook: the layer's output with the update added."""
        hidden = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        gated = hidden * getattr(module, GATE)[active_adapter].to(hidden.dtype)
        update: Tensor = module.lora_B[active_adapter](gated) * module.scaling[active_adapter]
        return result + update


class SoraModel(VariantModel):
    """PEFT's tuner for :class:`SoraConfig`."""

    variant = GateVariant


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


def gate_counts(model: nn.Module) -> dict[str, int]:
    """What the gates of the active adapter leave: open gates, all gates, and parameters once the rest is pruned."""
    adapter = active_adapter(model)
    layers = dict(adapted_layers(model, adapter))
    left = {name: int((gate != 0).sum()) for name, gate in gates(model).items()}
    total = sum(gate.numel() for gate in gates(model).values())
    parameters = sum(count * (layers[name].in_features + layers[name].out_features + 1) for name, count in left.items())
    return {"gates_left": sum(left.values()), "gates": total, "parameters_left": parameters}


register("SORA", SoraConfig, SoraModel)
