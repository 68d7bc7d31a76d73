"""The sections of a recipe: every setting, its type, its default and its meaning."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

EMBEDDED = "embedded"


def _expand(path: str) -> str:
    """A path with ``~`` and environment variables filled in."""
    expanded = os.path.expanduser(os.path.expandvars(path))  # noqa: PTH111 - beside expandvars, which Path has not
    if "$" in expanded:
        raise ValueError("an environment variable in it is not set: set it, or write the path out")
    return expanded


RESERVED = ("random", "popularity", "most frequent", "base model")
File = Annotated[str, AfterValidator(_expand)]
Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Part = Literal["minor", "principal", "middle", "random"]


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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


class ModelSettings(Section):
    """The base model, which is never changed."""

    path: str = Field(EMBEDDED, description="A folder, a hub id, or 'embedded' for the small model that ships here.")
    context: Count | None = Field(
        None, description="Most tokens of a row; the model's limit, at most 2048, if not given."
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Type of the frozen weights in memory.")


class TextData(Section):
    """Plain text, for language modelling."""

    kind: Literal["text"]
    train: File = Field(description="A .txt file, or a table with a text column.")
    validation: File | None = Field(None, description="Held-out text; a share of train where not given.")
    column: str | None = Field(None, description="The text column of a table; 'text' where not given.")
    separator: str | None = Field(None, description="Between documents of a .txt file: any text, or 'blank lines'.")
    holdout: Share = Field(0.1, description="Share of the documents held out where there is no validation file.")
    rows: Count | None = Field(None, description="Most documents to train on, drawn by the seed.")


class InstructionData(Section):
    """Prompts with answers; the loss is on the answers only."""

    kind: Literal["instructions"]
    train: File = Field(description="JSON, JSONL, CSV or Parquet: prompt and completion, Alpaca, or chat messages.")
    validation: File | None = Field(None, description="Held-out rows; a share of train where not given.")
    form: Literal["auto", "pairs", "alpaca", "chat"] = Field("auto", description="How the rows are written.")
    prompt: str | None = Field(None, description="Column of the prompt, where it has another name.")
    completion: str | None = Field(None, description="Column of the answer, where it has another name.")
    template: str | None = Field(
        None, description="What surrounds a prompt, such as '{prompt}\\n'; by the form if not given."
    )
    holdout: Share = Field(0.1, description="Share of the rows held out where there is no validation file.")
    rows: Count | None = Field(None, description="Most rows to train on, drawn by the seed.")


class ClassificationData(Section):
    """One or two sentences with a label."""

    kind: Literal["classification"]
    train: File = Field(description="JSON, JSONL, CSV, TSV or Parquet.")
    validation: File | None = Field(None, description="Held-out rows; a share of train where not given.")
    sentence1: str = Field("sentence1", description="Column of the first sentence.")
    sentence2: str | None = Field(None, description="Column of the second sentence, if there is one.")
    label: str = Field("label", description="Column of the label.")
    quoting: bool = Field(True, description="Whether quotes enclose fields; off for the GLUE files.")
    holdout: Share = Field(0.1, description="Share of the rows held out where there is no validation file.")
    rows: Count | None = Field(None, description="Most rows to train on, drawn by the seed.")


class RecommendationSettings(Section):
    """What interactions and published files have in common."""

    template: str = Field("films", description="A shipped template's name, or the path of your own.")
    negatives: Count = Field(3, description="Most rejected answers of a training row.")
    candidates: int = Field(20, ge=2, description="Candidates of an evaluation case, the true one included.")
    rows: Count | None = Field(None, description="Most training rows, drawn by the seed.")


class InteractionData(RecommendationSettings):
    """A log of interactions with a table of items."""

    kind: Literal["interactions"]
    interactions: File = Field(description="CSV, TSV, JSONL or Parquet: who, what, when.")
    items: File | None = Field(None, description="CSV, TSV, JSONL or Parquet: what, and its title.")
    user: str | None = Field(None, description="Column of the user; a common name is found.")
    item: str | None = Field(None, description="Column of the item in the interactions; a common name is found.")
    time: str | None = Field(None, description="Column of the time, a number or ISO date; a common name is found.")
    rating: str | None = Field(None, description="Column of the rating; a common name is found.")
    item_id: str | None = Field(None, description="Column of the item in the items; a common name is found.")
    title: str | None = Field(None, description="Column of the title; a common name is found.")
    minimum_rating: float | None = Field(None, description="Interactions rated lower are left out.")
    minimum_interactions: int = Field(3, ge=3, description="Users with fewer are left out.")
    history: Count = Field(10, description="Most items of a history.")
    tidy_titles: bool = Field(False, description="Write 'Matrix, The (1999)' as 'The Matrix (1999)'.")


class SdpoData(RecommendationSettings):
    """The files of the S-DPO and LLaRA authors."""

    kind: Literal["sdpo"]
    train: File = Field(description="S-DPO's JSON, or LLaRA's JSONL windows.")
    validation: File = Field(description="S-DPO's JSON, or LLaRA's JSONL windows.")
    test: File = Field(description="S-DPO's JSON, or LLaRA's JSONL windows.")
    template: str = Field("artists-candidates", description="A shipped template's name, or the path of your own.")
    names: File | None = Field(None, description="LLaRA's id2name.txt, where windows are read.")


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


class EvaluationSettings(Section):
    """What is measured after each stage."""

    split: Literal["validation", "test"] = Field("test", description="Part of the data; validation where no test is.")
    cases: Count | None = Field(None, description="Most cases, drawn by the seed; all where not given.")
    generate: bool = Field(True, description="In recommendation, also the papers' protocol: greedy text, substrings.")
    base: bool = Field(True, description="Also measure the base model.")


class ExportSettings(Section):
    """The finished adapter."""

    rank: Count | None = Field(None, description="Largest rank to keep; all where not given.")
    energy: float | None = Field(None, gt=0, le=1, description="Share of each update's squared norm to keep.")
    layout: Literal["uniform", "compact", "merged"] = Field("uniform", description="Form of the adapter.")


Adapter = Annotated[LoraSettings | MiloraSettings | SoraSettings, Field(discriminator="kind")]
Data = Annotated[
    TextData | InstructionData | ClassificationData | InteractionData | SdpoData, Field(discriminator="kind")
]
AnyStage = Annotated[SftStage | SoftmaxDpoStage, Field(discriminator="kind")]


class Recipe(Section):
    """Everything a run depends on."""

    name: str = Field("run", description="Shown in the report.")
    model: ModelSettings = ModelSettings()
    adapter: Adapter = MiloraSettings()
    data: Data
    stages: list[AnyStage] = Field(min_length=1)
    evaluation: EvaluationSettings = EvaluationSettings()
    export: ExportSettings = ExportSettings()
    output: str = Field(description="Folder of the run; must be new or empty.")
    seed: int = Field(0, ge=0, description="Of the data's draws, the adapter and the training.")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="Arithmetic of the training.")

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        """Name each unnamed stage by its kind; an adapter without a kind is the default one."""
        if isinstance(values, dict) and isinstance(values.get("stages"), list):
            named = [{"name": s.get("kind", ""), **s} if isinstance(s, dict) else s for s in values["stages"]]
            values = values | {"stages": named}
        if isinstance(values, dict) and isinstance(values.get("adapter"), dict):
            values = values | {"adapter": {"kind": "milora"} | values["adapter"]}
        return values

    @model_validator(mode="after")
    def _stages_fit(self) -> Recipe:
        """Names are unique, starts are known, and preference training has rows to train on."""
        names: list[str] = []
        for number, stage in enumerate(self.stages):
            if stage.name in RESERVED:
                raise ValueError(f"stages.{number}.name {stage.name!r} is a name of the result table: choose another")
            if stage.kind == "sft" and stage.loss == "row" and isinstance(self.data, ClassificationData):
                raise ValueError(f"stages.{number}.loss row: labels have no prompt to learn; use answer")
            if stage.name in names:
                raise ValueError(f"stages.{number}.name {stage.name!r} occurs twice: name each stage differently")
            if stage.start is not None and stage.start not in names:
                known = f"one of {', '.join(names)}" if names else "nothing: no stage is before it"
                raise ValueError(f"stages.{number}.start {stage.start!r} is no earlier stage; possible: {known}")
            if stage.kind == "softmax_dpo" and not isinstance(self.data, RecommendationSettings):
                raise ValueError(f"stages.{number}.kind softmax_dpo needs data of kind interactions or sdpo")
            if stage.kind == "softmax_dpo" and stage.negatives > self.data.negatives:  # type: ignore[union-attr]
                raise ValueError(f"stages.{number}.negatives {stage.negatives} is more than data.negatives: raise that")
            names.append(stage.name)
        return self

    @model_validator(mode="after")
    def _export_fits(self) -> Recipe:
        """Merged weights are not cut, and DoRA has no other form without its magnitude."""
        if self.adapter.use_dora and self.export.layout != "merged":
            raise ValueError("adapter.use_dora is no plain LoRA when it is finished: set export.layout to merged")
        if self.export.layout == "merged" and (self.export.rank or self.export.energy):
            raise ValueError("export.layout merged keeps the whole update: leave out export.rank and export.energy")
        return self
