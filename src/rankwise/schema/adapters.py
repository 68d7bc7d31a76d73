"""The adapter of a recipe: one section for each method."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rankwise.schema.base import Count, File, Part, Positive, Section


class LoraSettings(Section):
    """Plain LoRA (arXiv 2106.09685)."""

    kind: Literal["lora"] = "lora"
    r: Count = Field(16, description="Rank of each adapted matrix.")
    alpha: Positive | None = Field(None, description="Scaling numerator; 2 r where it is not given (r for MiLoRA).")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapter, a share.")
    target_modules: str | list[str] = Field("all-linear", description="Modules to adapt: all-linear, or their names.")
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(r) instead of alpha / r.")
    use_dora: bool = Field(False, description="Train a magnitude of each output too (DoRA, arXiv 2402.09353).")
    lora_plus_ratio: Positive | None = Field(
        None, description="Learning rate of B over that of A (LoRA+, arXiv 2402.12354); 1 where not given."
    )


class MiloraSettings(LoraSettings):
    """LoRA from one part of each weight's spectrum (arXiv 2406.09044)."""

    kind: Literal["milora"] = "milora"  # type: ignore[assignment]
    part: Part = Field("minor", description="Part of the spectrum.")
    cache: File | None = Field(None, description="Folder of finished decompositions to reuse; none where not given.")


class SoraSettings(LoraSettings):
    """LoRA with sparse gates, pruned at the end (arXiv 2311.11696)."""

    kind: Literal["sora"] = "sora"  # type: ignore[assignment]
    threshold: float = Field(3e-4, ge=0, description="Threshold of the proximal step, in units of the gate.")
    l1: float = Field(10.0, ge=0, description="Weight of the mean absolute gate in the loss.")
    gate_lr: Positive | None = Field(None, description="Learning rate of the gates; the stage's where not given.")
    gate_init: Literal["normal", "ones"] = Field("normal", description="Start of the gates.")
    mode: Literal["proximal", "reference"] = Field("proximal", description="Exact step, or the published code's.")
    part: Part | None = Field(None, description="Gate directions of this part of the spectrum; LoRA's if not given.")

    @model_validator(mode="after")
    def _fits(self) -> SoraSettings:
        """Gates have an optimizer and an update of their own."""
        for name in ("use_dora", "lora_plus_ratio"):
            if getattr(self, name):
                raise ValueError(f"{name} is not for SoRA: leave it out, or take kind lora or milora")
        return self


Adapter = Annotated[LoraSettings | MiloraSettings | SoraSettings, Field(discriminator="kind")]
