"""MiLoRA and its ablations: LoRA that starts from one part of each weight's spectrum."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig
from torch import nn

from rankwise.directions.dora import SpectralDoraVariant
from rankwise.directions.saving import CheckpointedConfig, CheckpointedModel
from rankwise.directions.spreading import starts_together
from rankwise.directions.start import StartPart, check_start_part
from rankwise.directions.variants import SpectralVariant, check_start_device
from rankwise.peft_bridge import Kind, LowRankVariant, adapted_layers, check_alphas, check_config, register


@dataclass
class MiloraConfig(CheckpointedConfig):
    """A ``peft.LoraConfig`` whose adapter starts from a part of each weight's spectrum, without changing the weight.

    With U, S, Vh the chosen triplets of W and s the scaling, B0 = U sqrt(S / s) and A0 = sqrt(S / s) Vh. The layer
    computes ``W x + s (B A - B0 A0) x`` with B, A starting at B0, A0: the same function as MiLoRA's ``(W - s B0 A0) x
    + s B A x``.

    Args:
        part: ``minor`` (MiLoRA), ``principal`` (PiSSA), ``middle`` or ``random`` (the paper's ablations); or ``qr``,
            the first columns of Q and rows of R of W = Q R (OLoRA, arXiv 2406.01775), no part of the spectrum.
        part_seed: of the draw for ``random``.
        lora_alpha: defaults to ``r``, as in the paper (LoRA's habit is 2 r).
        cache: folder of finished decompositions, which are found by the weight's content; none where not given. It
            and ``start_device`` belong to this machine and are not saved.
        use_dora: train a magnitude for each output too, on Linear and Conv1D; see ``directions.dora``.
        init_lora_weights: ``False`` computes no start: the values come from a file.
        start_device: on which weights are decomposed (``cuda``, say), one at a time; each weight's own where not given.

    Raises:
        UserError: an unknown part, a rank below 1, an alpha of 0 or less (also in a pattern), or a setting of another
            LoRA variant (``lora_bias``, say). When the model is adapted: a name in ``target_modules`` that matches
            nothing, a module that cannot be adapted, by name and with the reason, or an unknown ``start_device``.

    Source: MiLoRA (arXiv 2406.09044), section 3. It differs in that the base keeps its weight and a frozen initial
    pair is kept beside the trained one, so that nothing is rounded and ``disable_adapter()`` gives the true base; and
    with dropout both pairs see the same dropped input, so that training starts from the base exactly, where the
    paper's form drops inputs of ``B A`` only.
    """

    lora_alpha: int | float | None = field(
        default=None, metadata={"help": "Scaling numerator; r where it is not given."}
    )
    part: StartPart = field(default="minor", metadata={"help": "minor, principal, middle or random directions, or qr."})
    part_seed: int = field(default=0, metadata={"help": "Seed of the draw where part is random."})
    cache: str | None = field(default=None, metadata={"help": "Folder of finished starts to reuse; none where None."})
    start_device: str | None = field(
        default=None, metadata={"help": "Device on which weights are decomposed; each weight's own where None."}
    )

    def __post_init__(self) -> None:
        """Check the part and fill in alpha."""
        super().__post_init__()
        check_start_part(self.part)
        check_config(self, allowed=("use_dora",), starts=(True, False))
        if self.lora_alpha is None:
            self.lora_alpha = self.r
        check_alphas(self)
        self.peft_type = Kind.MILORA

    def to_dict(self) -> dict[str, Any]:
        """What is saved: all fields but those that belong to this machine."""
        return {name: value for name, value in super().to_dict().items() if name not in ("cache", "start_device")}


class MiloraModel(CheckpointedModel):
    """PEFT's tuner for :class:`MiloraConfig`."""

    def make_variant(self, config: LoraConfig) -> LowRankVariant:
        """Plain or with DoRA's magnitude."""
        return SpectralDoraVariant() if config.use_dora else SpectralVariant()

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's hook: as the base class's, where the device for its starts is one."""
        check_start_device(self.peft_config[adapter_name].start_device)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _start(self, model: nn.Module, adapter: str) -> None:
        layers, config = list(adapted_layers(model, adapter)), self.peft_config[adapter]
        with starts_together(layers, adapter, config):
            super()._start(model, adapter)


register(Kind.MILORA, MiloraConfig, MiloraModel)
