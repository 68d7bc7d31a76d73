"""A whole recipe, and the checks that need more than one of its sections."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from rankwise.schema.adapters import (
    AdaloraSettings,
    Adapter,
    BitfitSettings,
    FullSettings,
    LoraSettings,
    MiloraSettings,
    PrefixSettings,
    PromptSettings,
    SoraSettings,
    VeraSettings,
)
from rankwise.schema.base import EMBEDDED, Count, File, FileName, Layout, Section, Seed, Share, repeated
from rankwise.schema.data import (
    ChoiceData,
    ClassificationData,
    Data,
    GlueData,
    PreferenceData,
    RecommendationSettings,
    SequenceData,
)
from rankwise.schema.methods import written_out
from rankwise.schema.stages import AnyStage, SoftmaxDpoStage

LOOKED_AT = LoraSettings | VeraSettings | FullSettings  # whose updates are changes of matrices
SHARDED = ("lora", "milora", "sora")  # beside a base whose weights are spread over processes
NO_ROWS = ClassificationData | GlueData | SequenceData
Heading = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$")]
Baseline = Literal["random", "popularity", "item-knn", "als", "gru4rec", "caser", "sasrec"]
RESERVED = (*get_args(Baseline), "most frequent", "base model")  # rows of results, and files of their cases


class ModelSettings(Section):
    """The base model, which is never changed."""

    path: str = Field(EMBEDDED, description="A folder, a hub id, or 'embedded' for the small model that ships here.")
    context: Count | None = Field(
        None, description="Most tokens of a row; the model's limit, at most 2048, if not given."
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Type of the frozen weights in memory.")
    dropout: float | None = Field(
        None, ge=0, lt=1, description="All of the model's own dropout in training; as its config says if not given."
    )
    shard: bool = Field(
        False,
        description="Spread the frozen weights over all processes (FSDP2): no device holds the whole model.",
    )


class EvaluationSettings(Section):
    """What is measured after each stage."""

    split: Literal["validation", "test"] = Field("test", description="Part of the data; validation where no test is.")
    cases: Count | None = Field(None, description="Most cases, drawn by the seed; all where not given.")
    training_cases: Count | None = Field(
        None, description="Also measure on this many training rows, drawn by the seed; not in recommendation."
    )
    catalogue_cases: Count | None = Field(
        None,
        description="In recommendation, also rank the whole catalogue in this many cases; in none if not given.",
    )
    generate: bool = Field(
        True, description="In recommendation and choices, also the papers' protocol: greedy text, and what it names."
    )
    base: bool = Field(True, description="Also measure the base model.")
    texts: dict[Heading, File] = Field(
        {}, description="Of a language model, also the loss on these texts, by name: what it forgets of them."
    )
    tasks: dict[Heading, Data] = Field(
        {},
        description="Of a language model, also the metrics on these data, by name, sections as `data`: what it forgets "
        "of tasks that it is not trained for.",
    )
    text_rows: Count = Field(256, description="Most rows of each text, as long as the context, drawn by the seed.")
    updates: Count | None = Field(
        None,
        description="For LoRA's kin, VeRA and full, also where the finished updates lie: in this many directions at "
        "the top, middle and bottom of each weight's spectrum; not looked at if not given.",
    )
    drift: Count | None = Field(
        None,
        description="Also how far the hidden states of this many training rows, and of as many rows of each text, have "
        "drifted in each layer (linear CKA); not looked at if not given.",
    )
    noise: list[Literal["characters", "dropped-words", "swapped-words"]] = Field(
        [], description="In classification and GLUE, also measure on held-out sentences with these mistakes."
    )
    noise_share: Share = Field(0.1, description="Share of the words that get a mistake.")
    baselines: list[Baseline] = Field(
        ["random", "popularity"],
        description="In recommendation, what else is measured; item-knn and als need rankwise[recsys].",
    )


class ExportSettings(Section):
    """The finished adapter."""

    rank: Count | None = Field(None, description="Largest rank to keep; all where not given.")
    energy: float | None = Field(None, gt=0, le=1, description="Share of each update's squared norm to keep.")
    layout: Layout | None = Field(
        None,
        description="Form: a plain LoRA of one rank or of each layer's own, PEFT's own, or a whole model; if not "
        "given, uniform where the method has it, else own, else merged.",
    )


class Recipe(Section):
    """Everything a run depends on."""

    name: str = Field("run", description="Shown in the report.")
    model: ModelSettings = ModelSettings()
    adapter: Adapter = MiloraSettings()
    data: Data
    stages: list[AnyStage] = Field(min_length=1)
    evaluation: EvaluationSettings = EvaluationSettings()
    export: ExportSettings = ExportSettings()
    output: FileName = Field(description="Folder of the run; new or empty, or of the same run, unfinished.")
    seed: Seed = Field(0, description="Of the data's draws, the adapter and the training.")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="Arithmetic of the training.")
    deterministic: bool = Field(
        False, description="Refuse GPU kernels whose results differ from run to run; slower, and not needed on a CPU."
    )
    checkpoint_seconds: float | None = Field(
        600.0,
        ge=0,
        description="Between two checkpoints of a training, from which the same command goes on after a crash (more "
        "where one takes more than a twentieth of it); null: only one where it is stopped by SIGTERM or Ctrl-C.",
    )
    log_to: list[Literal["tensorboard", "trackio", "wandb"]] = Field(
        [], description="Also log training there, with what is installed of tensorboard, trackio and wandb."
    )

    @property
    def virtual_tokens(self) -> int:
        """Of the context, those that the adapter takes."""
        return self.adapter.tokens if isinstance(self.adapter, PromptSettings | PrefixSettings) else 0

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        """Name each unnamed stage by its kind; write out a method that is named."""
        if isinstance(values, dict) and isinstance(values.get("stages"), list):
            named = [{"name": s.get("kind", ""), **s} if isinstance(s, dict) else s for s in values["stages"]]
            values = values | {"stages": named}
        if isinstance(values, dict) and "adapter" in values:
            values = values | {"adapter": written_out(values["adapter"])}
        return values

    @model_validator(mode="after")
    def _stages_fit(self) -> Recipe:
        """Names are unique, starts are known, and preference training has rows to train on."""
        names: list[str] = []
        for number, stage in enumerate(self.stages):
            if stage.kind == "sft" and stage.loss == "row" and isinstance(self.data, NO_ROWS):
                raise ValueError(f"stages.{number}.loss row: data of kind {self.data.kind} have no prompt to learn")
            made = [one.name for one in stage.written_out()]
            if taken := next((name for name in made if name.casefold() in RESERVED), None):
                raise ValueError(f"stages.{number}.name {taken!r} is a name of the result table: choose another")
            if twice := repeated([*names, *made]):
                raise ValueError(
                    f"stages.{number}.name {twice!r} occurs twice, letters' case aside: name each stage differently"
                )
            if stage.start is not None and stage.start not in names:
                known = f"one of {', '.join(names)}" if names else "nothing: no stage is before it"
                raise ValueError(f"stages.{number}.start {stage.start!r} is no earlier stage; possible: {known}")
            if stage.kind == "softmax_dpo":
                self._answers_fit(number, stage)
            names += made
        return self

    def _answers_fit(self, number: int, stage: SoftmaxDpoStage) -> None:
        """The data have the answers that a preference stage wants."""
        data = self.data
        if not isinstance(data, RecommendationSettings | PreferenceData | ChoiceData):
            raise ValueError(
                f"stages.{number}.kind softmax_dpo needs data of kind interactions, sdpo, preferences or choices"
            )
        if isinstance(data, PreferenceData | ChoiceData) and stage.draw in ("uniform", "popularity", "hard"):
            raise ValueError(
                f"stages.{number}.draw {stage.draw} draws from all titles, which data of kind {data.kind} have not: "
                "use given, candidates or in-batch"
            )
        own = stage.draw in ("given", "candidates")
        if own and isinstance(data, RecommendationSettings) and stage.most_negatives > data.negatives:
            raise ValueError(f"stages.{number}.negatives {stage.negatives} is more than data.negatives: raise that")

    @model_validator(mode="after")
    def _thresholds_fit(self) -> Recipe:
        """Only SoRA has thresholds, where it has no budget; a stage with several stands for one stage each."""
        sora = self.adapter if isinstance(self.adapter, SoraSettings) else None
        for number, stage in enumerate(self.stages):
            for name in ("threshold", "thresholds"):
                if getattr(stage, name, None) is None:
                    continue
                if sora is None:
                    kind = self.adapter.kind
                    raise ValueError(f"stages.{number}.{name} is for adapters of kind sora, not {kind}: leave it out")
                if sora.target_parameters is not None or sora.target_ratio is not None:
                    raise ValueError(f"stages.{number}.{name}: the adapter has a budget instead: leave out one of them")
        # The recipe is frozen for everyone else; here it is still being made.
        object.__setattr__(self, "stages", [one for stage in self.stages for one in stage.written_out()])
        return self

    @model_validator(mode="after")
    def _training_cases_fit(self) -> Recipe:
        """In recommendation, training rows have other candidates than the held-out cases: scores would not compare."""
        if self.evaluation.training_cases is not None and isinstance(self.data, RecommendationSettings):
            raise ValueError(
                f"evaluation.training_cases is not for data of kind {self.data.kind}, whose training rows have other "
                "candidates than its held-out cases: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _measures_fit(self) -> Recipe:
        """Mistakes are made in sentences with labels, and a text's loss is a language model's."""
        if self.evaluation.noise and not isinstance(self.data, ClassificationData | GlueData):
            raise ValueError(f"evaluation.noise is for classification and glue, not {self.data.kind}: leave it out")
        if self.evaluation.texts and isinstance(self.data, NO_ROWS):
            raise ValueError(f"evaluation.texts are for language models, not {self.data.kind}: leave them out")
        if self.evaluation.tasks and isinstance(self.data, NO_ROWS):
            raise ValueError(f"evaluation.tasks are for language models, not {self.data.kind}: leave them out")
        for name, data in self.evaluation.tasks.items():
            if isinstance(data, NO_ROWS | RecommendationSettings):
                raise ValueError(
                    f"evaluation.tasks.{name} of kind {data.kind} is not possible beside others: leave it out"
                )
            if name in self.evaluation.texts:
                raise ValueError(f"evaluation has a text and a task {name!r}: call one of them something else")
        return self

    @model_validator(mode="after")
    def _trained_in_float32(self) -> Recipe:
        """Steps of AdamW are smaller than what bfloat16 can tell apart."""
        if self.model.dtype != "float32" and isinstance(self.adapter, FullSettings | BitfitSettings):
            raise ValueError(
                f"model.dtype {self.model.dtype} would round away what adapter.kind {self.adapter.kind} learns: use "
                "float32 (precision: bfloat16 computes faster all the same)"
            )
        return self

    @model_validator(mode="after")
    def _can_be_spread(self) -> Recipe:
        """Each process has the whole adapter, and a part of the base that nothing writes or multiplies out."""
        if not self.model.shard:
            return self
        kind, layout = self.adapter.kind, self.export.layout or self.adapter.layouts[0]
        if isinstance(self.data, NO_ROWS):
            raise ValueError(f"model.shard is for language models, not for data of kind {self.data.kind}: leave it out")
        if kind not in SHARDED or getattr(self.adapter, "use_dora", False):
            raise ValueError(
                f"model.shard is for adapters of kind lora, milora and sora without use_dora, not {kind}: leave it out"
            )
        if any(getattr(stage, "draw", None) == "hard" for stage in self.stages):
            raise ValueError("model.shard: each process mines hard answers alone, with all weights: draw others")
        if layout == "merged":
            raise ValueError("model.shard: no process has the weights to write with export.layout merged: export later")
        return self

    @model_validator(mode="after")
    def _base_is_there(self) -> Recipe:
        """What trains the model's own weights leaves no base to refer to."""
        referring = [stage.kind for stage in self.stages if getattr(stage, "reference", None) == "base"]
        if referring and isinstance(self.adapter, FullSettings | BitfitSettings):
            raise ValueError(
                f"stages: reference base of {referring[0]} needs an adapter that can be left out, and adapter.kind is "
                f"{self.adapter.kind}: take reference start"
            )
        return self

    @model_validator(mode="after")
    def _updates_fit(self) -> Recipe:
        """Updates are looked at where they are changes of matrices."""
        if self.evaluation.updates is not None and not isinstance(self.adapter, LOOKED_AT):
            raise ValueError(
                f"evaluation.updates is for LoRA's kin, VeRA and full fine-tuning, not {self.adapter.kind}: leave it "
                "out"
            )
        return self

    @model_validator(mode="after")
    def _one_allocation(self) -> Recipe:
        """AdaLoRA's ranks fall over one training, and stay."""
        if isinstance(self.adapter, AdaloraSettings) and len(self.stages) > 1:
            raise ValueError(
                f"adapter.kind adalora is for one stage, and there are {len(self.stages)}: its ranks fall over the "
                "steps of one training, and a second one would begin with what the first cut; leave the others out"
            )
        return self

    @model_validator(mode="after")
    def _no_virtual_tokens(self) -> Recipe:
        """A catalogue's titles are scored after one cached prompt, which has no place for virtual tokens."""
        if isinstance(self.adapter, PromptSettings | PrefixSettings) and isinstance(self.data, RecommendationSettings):
            raise ValueError(
                f"adapter.kind {self.adapter.kind} is not for data of kind {self.data.kind}: its virtual tokens "
                "have no place in the tree of a catalogue's titles; take another method"
            )
        return self

    @model_validator(mode="after")
    def _export_fits(self) -> Recipe:
        """The method has the wanted form, and only a plain LoRA is cut."""
        known, wanted = self.adapter.layouts, self.export
        if wanted.layout is None:
            wanted = wanted.model_copy(update={"layout": known[0]})
            object.__setattr__(self, "export", wanted)
        if wanted.layout not in known:
            raise ValueError(
                f"export.layout {wanted.layout} is none of this adapter (kind {self.adapter.kind}"
                f"{', use_dora' if getattr(self.adapter, 'use_dora', False) else ''}): use {' or '.join(known)}"
            )
        if wanted.layout in ("own", "merged") and (wanted.rank or wanted.energy):
            raise ValueError(
                f"export.layout {wanted.layout} keeps the whole update: leave out export.rank and export.energy"
            )
        return self
