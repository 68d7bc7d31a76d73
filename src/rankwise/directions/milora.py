"""MiLoRA and its ablations: LoRA that starts from one part of each weight's spectrum."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from peft.utils.other import transpose
from torch import Tensor, nn

from rankwise.directions.triplets import Part, check_part, triplets
from rankwise.errors import UserError
from rankwise.peft_bridge import LowRankVariant, VariantModel, check_config, keep_state, register

START = "lora_start"


@dataclass
class MiloraConfig(LoraConfig):
    """A ``peft.LoraConfig`` whose adapter starts from a part of each weight's spectrum, without changing the weight.

    With U, S, Vh the chosen triplets of W and s the scaling, B0 = U sqrt(S / s) and A0 = sqrt(S / s) Vh. The layer
    computes ``W x + s (B A - B0 A0) x`` with B, A starting at B0, A0: the same function as MiLoRA's ``(W - s B0 A0) x
    + s B A x``.

    Args:
        part: ``minor`` (MiLoRA), ``principal`` (PiSSA), ``middle`` or ``random`` (the paper's ablations).
        part_seed: of the draw for ``random``.
        lora_alpha: defaults to ``r``, as in the paper (LoRA's habit is 2 r).

    Raises:
        UserError: an unknown part, an alpha of 0 or less, or a setting of another LoRA variant (``use_dora``, say).

    Source: MiLoRA (arXiv 2406.09044), section 3. It differs in that the base keeps its weight and a frozen initial
    pair is kept beside the trained one, so that nothing is rounded and ``disable_adapter()`` gives the true base; and
    with dropout both pairs see the same dropped input, so that training starts from the base exactly, where the
    paper's form drops inputs of ``B A`` only.
    """

    lora_alpha: int | float | None = field(
        default=None, metadata={"help": "Scaling numerator; r where it is not given."}
    )
    part: Part = field(default="minor", metadata={"help": "minor, principal, middle or random directions."})
    part_seed: int = field(default=0, metadata={"help": "Seed of the draw where part is random."})

    def __post_init__(self) -> None:
        """Check the part and fill in alpha."""
        super().__post_init__()
        check_part(self.part)
        check_config(self)
        if self.lora_alpha is None:
            self.lora_alpha = self.r
        if not self.lora_alpha > 0:
            raise UserError(f"MiloraConfig(lora_alpha={self.lora_alpha}) is not possible: it must be above 0")
        self.peft_type = "MILORA"


class FrozenPair(nn.Module):
    """The initial A0 and B0 of one adapter: buffers, so that they are saved and moved but never trained."""

    A: Float[Tensor, "rank in"]
    B: Float[Tensor, "out rank"]

    def __init__(self, a: Float[Tensor, "rank in"], b: Float[Tensor, "out rank"]) -> None:
        super().__init__()
        self.register_buffer("A", a)
        self.register_buffer("B", b)


class SpectralVariant(LowRankVariant):
    """The update s (B A - B0 A0), computed as s ((B - B0) A + B0 (A - A0)): exactly zero at the start."""

    def attach(self, layer: Linear, adapter: str, config: LoraConfig) -> None:
        """Set A and B to the chosen triplets and keep a frozen copy of both."""
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        if not a.is_meta:
            start_from_spectrum(layer, adapter, config)
        pair = FrozenPair(a.detach().clone(), b.detach().clone())
        keep_state(layer, START, adapter, pair)

    def stacked(self, layer: Linear, adapter: str) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]:
        """[B - B0, B0] and [A; A - A0], whose product is B A - B0 A0."""
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        pair = getattr(layer, START)[adapter]
        a0, b0 = pair.A.to(a.dtype), pair.B.to(b.dtype)
        return torch.cat([b - b0, b0], dim=1), torch.cat([a, a - a0], dim=0)

    def factors(self, layer: Linear, adapter: str) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]:
        """The stacked factors, detached."""
        b, a = self.stacked(layer, adapter)
        return b.detach(), a.detach()

    def forward(self, module: Linear, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """PEFT's hook: the layer's output with the update added."""
        b, a = self.stacked(module, active_adapter)
        hidden = nn.functional.linear(module.lora_dropout[active_adapter](x), a)
        update: Tensor = nn.functional.linear(hidden, b) * module.scaling[active_adapter]
        return result + update


class MiloraModel(VariantModel):
    """PEFT's tuner for :class:`MiloraConfig`."""

    variant = SpectralVariant


def start_from_spectrum(layer: Linear, adapter: str, config: LoraConfig) -> None:
    """Fill A and B with B0 = U sqrt(S / s) and A0 = sqrt(S / s) Vh of the layer's weight."""
    assert isinstance(config, MiloraConfig)
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    weight = transpose(layer.get_base_layer().weight, layer.fan_in_fan_out)
    u, s, vh = triplets(weight, layer.r[adapter], config.part, config.part_seed)
    root = (s / layer.scaling[adapter]).sqrt()
    a.copy_(root[:, None] * vh)
    b.copy_(u * root)


register("MILORA", MiloraConfig, MiloraModel)
