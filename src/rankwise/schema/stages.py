"""The stages of a recipe: one section for each kind of training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rankwise.schema.base import Count, Positive, Section


class Stage(Section):
    """One training of the adapter."""

    name: str = Field(
        "",
        pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$",
        description="Name in tables and folders; the kind if not given.",
    )
    start: str | None = Field(None, description="Stage to start from; the one before where not given.")
    epochs: Positive = Field(1.0, description="Passes over the training rows.")
    learning_rate: Positive = Field(5e-4, description="Peak learning rate.")
    batch_size: Count = Field(16, description="Rows of one step on each device.")
    accumulation: Count = Field(1, description="Batches whose gradients are added up before a step.")
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps in which the rate rises.")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="How the rate falls.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of AdamW; never on gates.")
    clip: Positive = Field(1.0, description="Largest norm of the gradient.")


class SftStage(Stage):
    """Supervised training."""

    kind: Literal["sft"]
    loss: Literal["answer", "row"] = Field("answer", description="Tokens with loss: the answer's, or the prompt's too.")


class SoftmaxDpoStage(Stage):
    """Preference training of the right answer against others (arXiv 2406.09215)."""

    kind: Literal["softmax_dpo"]
    negatives: Count = Field(3, description="Rejected answers of each row; one is DPO.")
    beta: Positive = Field(1.0, description="Strength of the tie to the model that the stage starts from.")
    rows: Count | None = Field(None, description="Most preference rows, drawn by the seed.")


AnyStage = Annotated[SftStage | SoftmaxDpoStage, Field(discriminator="kind")]
