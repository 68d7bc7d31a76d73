"""The adapter of a recipe: one section for each method."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rankwise.schema.base import Count, File, Layout, Names, Part, Positive, Section, Share, StartPart


class LoraSettings(Section):
    """Plain LoRA (arXiv 2106.09685)."""

    kind: Literal["lora"] = "lora"
    r: Count = Field(16, description="Rank of each adapted matrix.")
    alpha: Positive | None = Field(None, description="Scaling numerator; 2 r where it is not given (r for MiLoRA).")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapter, a share.")
    target_modules: str | Names = Field("all-linear", description="Modules to adapt: all-linear, or their names.")
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(r) instead of alpha / r.")
    use_dora: bool = Field(False, description="Train a magnitude of each output too (DoRA, arXiv 2402.09353).")
    lora_plus_ratio: Positive | None = Field(
        None, description="Learning rate of B over that of A (LoRA+, arXiv 2402.12354); 1 where not given."
    )

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Forms in which it can be exported, the usual one first; DoRA's magnitude has none in plain LoRA."""
        return ("own", "merged") if self.use_dora else ("uniform", "compact", "merged")


class MiloraSettings(LoraSettings):
    """LoRA from one part of each weight's spectrum (arXiv 2406.09044)."""

    kind: Literal["milora"] = "milora"  # type: ignore[assignment]
    part: StartPart = Field(
        "minor", description="Part of the spectrum; or qr, the first rows of its QR decomposition (arXiv 2406.01775)."
    )
    cache: File | None = Field(None, description="Folder of finished decompositions to reuse; none where not given.")

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """As of plain LoRA; with DoRA's magnitude merged weights, or its own: PEFT's DoRA of twice the rank."""
        return ("merged", "own") if self.use_dora else super().layouts


class SoraSettings(LoraSettings):
    """LoRA with sparse gates, pruned at the end (arXiv 2311.11696)."""

    kind: Literal["sora"] = "sora"  # type: ignore[assignment]
    threshold: float = Field(3e-4, ge=0, description="Threshold of the proximal step, in units of the gate.")
    threshold_scaling: Literal["none", "learning_rate"] = Field(
        "none", description="Times the gates' learning rate (the paper's lambda), or as it is (its code's xi)."
    )
    l1: float = Field(10.0, ge=0, description="Weight of the mean absolute gate in the loss.")
    target_parameters: Count | None = Field(None, description="Parameters to keep: a budget instead of a threshold.")
    target_ratio: float | None = Field(None, gt=0, le=1, description="The same as a share of all parameters.")
    budget_by: float = Field(0.5, gt=0, le=1, description="Share of a stage after which the budget is met.")
    shrink_after: Count | None = Field(
        None, description="Steps after which a closed gate is cut out while training; only at the end if not given."
    )
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
        if self.target_parameters is not None and self.target_ratio is not None:
            raise ValueError("target_ratio and target_parameters are two budgets: give one of them")
        if self.mode == "reference" and (self.target_parameters or self.target_ratio):
            raise ValueError("mode reference zeroes more than a budget asks for: take mode proximal")
        return self


class AllocatingLoraSettings(LoraSettings):
    """LoRA whose directions move to the layers that need them (allocating LoRA, arXiv 2403.16187)."""

    kind: Literal["allocating_lora"] = "allocating_lora"  # type: ignore[assignment]
    events: Count = Field(5, description="How many times directions are moved, in each stage.")
    share: Share = Field(0.1, description="Share of all directions that is moved each time.")
    first: float = Field(0.2, ge=0, lt=1, description="Share of the steps after which they are moved first.")
    last: float = Field(0.7, ge=0, lt=1, description="Share of the steps after which they are moved last.")
    validation_rows: Count = Field(
        256, description="Most training rows held out to score on, a batch an event; drawn by the seed."
    )

    @model_validator(mode="after")
    def _fits(self) -> AllocatingLoraSettings:
        """Directions are those of plain LoRA, and the first move comes before the last."""
        for name in ("use_dora", "lora_plus_ratio"):
            if getattr(self, name):
                raise ValueError(f"{name} is not for allocating LoRA: leave it out, or take kind lora or milora")
        if self.first > self.last:
            raise ValueError(f"first {self.first} is after last {self.last}: directions are moved from first to last")
        return self


class AdaloraSettings(LoraSettings):
    """LoRA whose ranks fall to a mean, each matrix to its own, by importance (AdaLoRA, arXiv 2303.10512)."""

    kind: Literal["adalora"] = "adalora"  # type: ignore[assignment]
    r: Count = Field(16, description="Mean rank of the adapted matrices at the end.")
    alpha: Positive | None = Field(
        None, description="Scaling numerator over the initial rank; twice that rank if not given."
    )
    initial_rank: Count | None = Field(None, description="Rank at the start, above r; 1.5 r where it is not given.")
    warmup_share: float = Field(0.15, ge=0, lt=1, description="Share of the steps before the first direction is cut.")
    final_share: float = Field(0.5, ge=0, lt=1, description="Share of the steps, at the end, in which the ranks stay.")
    every: Count = Field(1, description="Steps from one allocation to the next.")
    orthogonality: float = Field(0.1, ge=0, description="Weight in the loss of how far A and B are from orthonormal.")
    beta1: Share = Field(0.85, description="Memory of the importance, a share.")
    beta2: Share = Field(0.85, description="Memory of the importance's uncertainty, a share.")

    @property
    def first_rank(self) -> int:
        """The rank of every matrix at the start."""
        return self.initial_rank or -(-3 * self.r // 2)

    @model_validator(mode="after")
    def _fits(self) -> AdaloraSettings:
        """There is something to cut, and steps to do it in; PEFT's AdaLoRA has a scaling of its own and no variants."""
        for name in ("use_dora", "use_rslora", "lora_plus_ratio"):
            if getattr(self, name):
                raise ValueError(f"{name} is not for AdaLoRA: leave it out, or take kind lora or milora")
        if self.first_rank <= self.r:
            raise ValueError(f"initial_rank {self.initial_rank} leaves nothing to cut: it must be above r, {self.r}")
        if self.warmup_share + self.final_share >= 1:
            raise ValueError(
                f"warmup_share {self.warmup_share} and final_share {self.final_share} leave no step to cut in: their "
                "sum must be below 1"
            )
        return self


class VeraSettings(Section):
    """Vectors around random matrices that all layers share (VeRA, arXiv 2310.11454)."""

    kind: Literal["vera"] = "vera"
    r: Count = Field(256, description="Rank of the shared random matrices, which are not trained.")
    d_initial: Positive = Field(0.1, description="Start of the vector between the two matrices.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapter, a share.")
    target_modules: str | Names = Field("all-linear", description="Modules to adapt: all-linear, or their names.")

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Forms in which it can be exported, the usual one first."""
        return ("own", "merged")


class BottleneckSettings(Section):
    """Small networks after the blocks of each layer: Houlsby's (arXiv 1902.00751) or Pfeiffer's (arXiv 2005.00247)."""

    kind: Literal["bottleneck"] = "bottleneck"
    placement: Literal["houlsby", "pfeiffer"] = Field(
        "houlsby", description="After attention and feed-forward, or after the feed-forward block alone."
    )
    size: Count = Field(64, description="Width of the bottleneck.")
    activation: Literal["gelu", "relu", "silu", "tanh"] = Field("gelu", description="Between its two matrices.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of its output, a share.")
    target_modules: Names | None = Field(
        None, description="Modules to follow, where they are others than the blocks' last projections."
    )

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Its own form alone: what is not linear cannot be merged."""
        return ("own",)


class PromptSettings(Section):
    """Trained vectors before the input's embeddings (prompt tuning, arXiv 2104.08691)."""

    kind: Literal["prompt"] = "prompt"
    tokens: Count = Field(20, description="Vectors, which take as many of the context's tokens.")
    start: Literal["vocabulary", "random"] = Field("vocabulary", description="Embeddings of random tokens, or noise.")

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Its own form alone: it is no weight."""
        return ("own",)


class PrefixSettings(Section):
    """Trained keys and values before those of the input, in each layer (prefix tuning, arXiv 2101.00190)."""

    kind: Literal["prefix"] = "prefix"
    tokens: Count = Field(20, description="Keys and values of a layer, which take as many of the context's tokens.")
    projection: bool = Field(False, description="Train them through a small network, as the paper does.")

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Its own form alone: it is no weight."""
        return ("own",)


class BitfitSettings(Section):
    """The biases alone are trained (BitFit, arXiv 2106.10199)."""

    kind: Literal["bitfit"] = "bitfit"

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Forms in which it can be exported, the usual one first."""
        return ("own", "merged")


class FullSettings(Section):
    """All weights are trained; each stage keeps a whole model."""

    kind: Literal["full"] = "full"

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """A whole model alone."""
        return ("merged",)


AdapterSettings = (
    LoraSettings
    | MiloraSettings
    | SoraSettings
    | AllocatingLoraSettings
    | AdaloraSettings
    | VeraSettings
    | BottleneckSettings
    | PromptSettings
    | PrefixSettings
    | BitfitSettings
    | FullSettings
)
Adapter = Annotated[AdapterSettings, Field(discriminator="kind")]
