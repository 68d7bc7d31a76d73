"""The stages of a recipe: one section for each kind of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from rankwise.schema.base import Count, FileName, FolderName, Positive, Section
from rankwise.schema.negatives import negatives_misfit

Threshold = Annotated[float, Field(ge=0)]


class Stage(Section):
    """One training of the adapter."""

    name: FolderName = Field(
        "",
        max_length=100,
        pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$",
        description="Name in tables and folders; the kind if not given.",
    )
    start: str | None = Field(None, description="Stage to start from; the one before where not given.")
    epochs: Positive = Field(1.0, description="Passes over the training rows.")
    learning_rate: Positive = Field(5e-4, description="Peak learning rate.")
    batch_size: Count = Field(16, description="Rows of one step, of all processes together.")
    accumulation: Count = Field(1, description="Batches whose gradients are added up before a step.")
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps in which the rate rises.")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="How the rate falls.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of AdamW; never on gates.")
    clip: Positive = Field(1.0, description="Largest norm of the gradient.")
    on_nan: Literal["stop", "skip"] = Field(
        "stop",
        description="What a step does whose loss or gradient is no number: end the run, or be left out, counted.",
    )

    def written_out(self) -> Sequence[Stage]:
        """The stages that this one stands for."""
        return [self]


class RisingThresholds(Section):
    """Thresholds from the smallest to the largest, one for each of several stages."""

    largest: Threshold = Field(description="Threshold of the last stage, in units of the gate.")
    stages: Count = Field(description="How many stages.")
    spacing: Literal["linear", "log-linear", "exp-linear"] = Field(
        "linear", description="Even steps, even ones of the exponential (log-linear), or of the logarithm (exp-linear)."
    )
    smallest: Threshold = Field(0.0, description="Threshold of the first stage; above 0 for exp-linear.")

    @model_validator(mode="after")
    def _rise(self) -> RisingThresholds:
        """The ends fit the spacing."""
        self.values()
        return self

    def values(self) -> list[float]:
        """The threshold of each stage."""
        from rankwise.ranks.sora.schedule import (
            rising_thresholds,  # imports torch, which other recipes are read without
        )

        return rising_thresholds(self.largest, self.stages, self.spacing, self.smallest)


Thresholds = Annotated[
    Annotated[RisingThresholds, Tag("mapping")] | Annotated[list[Threshold], Tag("list")],
    Discriminator(lambda value: "mapping" if isinstance(value, dict | RisingThresholds) else "list"),
]


class SftStage(Stage):
    """Supervised training."""

    kind: Literal["sft"]
    loss: Literal["answer", "row"] = Field("answer", description="Tokens with loss: the answer's, or the prompt's too.")
    group_by_length: bool = Field(
        False,
        description="Draw batches of rows of about the same length, so that less is padded: of at most 50 batches "
        "at a time, the longest first. Where rows are few a method may learn nothing from them: see the loss.",
    )
    threshold: Threshold | None = Field(None, description="Of SoRA, in this stage; the adapter's where not given.")
    thresholds: Thresholds | None = Field(
        None,
        description="Of SoRA: a list that does not fall, or a mapping (see below). Each makes a stage of its own, "
        "`<name>-1` and so on, which starts from the one before: with this stage's epochs, and a learning rate whose "
        "schedule begins anew.",
    )

    @field_validator("thresholds")
    @classmethod
    def _do_not_fall(cls, given: RisingThresholds | list[float] | None) -> RisingThresholds | list[float] | None:
        """A list has a threshold, and none below the one before it."""
        if isinstance(given, list):
            if not given:
                raise ValueError("there is no threshold in it: give one or more, or leave thresholds out")
            falls = [at for at in range(1, len(given)) if given[at] < given[at - 1]]
            if falls:
                before, after = given[falls[0] - 1], given[falls[0]]
                raise ValueError(f"{after} stands after {before}: thresholds must not fall from stage to stage")
        return given

    @model_validator(mode="after")
    def _one_way(self) -> SftStage:
        """One threshold or several."""
        if self.threshold is not None and self.thresholds is not None:
            raise ValueError("threshold and thresholds are both given: leave one of them out")
        return self

    def written_out(self) -> Sequence[SftStage]:
        """This stage, or one for each of its thresholds, each from the one before."""
        if self.thresholds is None:
            return [self]
        values = self.thresholds if isinstance(self.thresholds, list) else self.thresholds.values()
        names = [f"{self.name}-{number}" for number in range(1, len(values) + 1)]
        return [
            self.model_copy(update={"name": name, "start": start, "threshold": value, "thresholds": None})
            for name, start, value in zip(names, [self.start, *names[:-1]], values, strict=True)
        ]


class SoftmaxDpoStage(Stage):
    """Preference training of the right answer against others (arXiv 2406.09215)."""

    kind: Literal["softmax_dpo"]
    negatives: Count | list[Count] = Field(
        3, description="Rejected answers of each row, one is DPO; a list grows in equal parts of the training."
    )
    draw: Literal["given", "candidates", "uniform", "popularity", "in-batch", "hard"] = Field(
        "given",
        description="Which: the first of those prepared; or anew for each pass: of those prepared (candidates), of all "
        "titles (uniform, popularity, or hard: those that the model finds most likely), or of the batch's other rows.",
    )
    beta: Positive = Field(1.0, description="Strength of the tie to the reference.")
    reference: Literal["start", "base", "none"] = Field(
        "start", description="The model as it is when the stage begins, the base without the adapter, or none."
    )
    reference_cache: FileName | None = Field(None, description="Folder in which the reference's values are kept.")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Share of the target that goes to the rejected.")
    length_normalised: bool = Field(False, description="Log-probabilities per token of an answer, not their sum.")
    sft_weight: float = Field(0.0, ge=0, description="Weight of the chosen answer's cross-entropy in the loss.")
    weigh_negatives: bool = Field(False, description="Correct draws by popularity for their chances.")
    hardness: float = Field(0.0, ge=0, description="Weigh rejected answers by exp(hardness * margin) too.")
    mine_every: Count = Field(1, description="Steps for whose rows hard answers are mined at once.")
    mine_pool: Count | None = Field(None, description="Titles that are ranked for a row to mine; all if not given.")
    rows: Count | None = Field(None, description="Most preference rows, drawn by the seed.")

    @field_validator("negatives")
    @classmethod
    def _grow(cls, given: int | list[int]) -> int | list[int]:
        """A list has a number, and none below the one before it."""
        if isinstance(given, list) and (not given or sorted(given) != given):
            raise ValueError(f"{given} does not grow: give one number, or a list of them that never falls")
        return given

    @model_validator(mode="after")
    def _negatives_fit(self) -> SoftmaxDpoStage:
        """Settings that only some draws have are given for those alone."""
        most = self.most_negatives
        misfit = negatives_misfit(
            self.draw, most, self.batch_size, self.weigh_negatives, self.mine_every, self.mine_pool
        )
        if misfit is not None:
            name = "batch_size" if misfit[0] == "batch" else misfit[0]
            raise ValueError(f"{name} {getattr(self, name)} is not possible: {misfit[1]}")
        return self

    @property
    def most_negatives(self) -> int:
        """Of a row, at the end."""
        return self.negatives[-1] if isinstance(self.negatives, list) else self.negatives


AnyStage = Annotated[SftStage | SoftmaxDpoStage, Field(discriminator="kind")]
