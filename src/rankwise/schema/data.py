"""The data of a recipe: one section for each kind."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rankwise.schema.base import Count, File, Moment, Positive, Section, Share


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


class MathsData(Section):
    """Maths problems with worked solutions; the loss is on the solutions, and final answers are compared by value."""

    kind: Literal["maths"]
    train: File = Field(description="A table of question and answer (GSM8K), or problem and solution (MATH's folder).")
    validation: File | None = Field(None, description="Held-out problems; a share of train where not given.")
    template: str = Field(
        "Question: {prompt}\nAnswer:\n", description="What surrounds a problem, which stands at '{prompt}'."
    )
    tokens: Count = Field(320, description="Most tokens that the model writes for a solution, in evaluation.")
    holdout: Share = Field(0.1, description="Share of the rows held out where there is no validation file.")
    rows: Count | None = Field(None, description="Most rows to train on, drawn by the seed.")


class ChoiceData(Section):
    """Questions with a choice of answers: the commonsense sets in LLM-Adapters' form (arXiv 2304.01933)."""

    kind: Literal["choices"]
    train: File = Field(description="JSON of instruction, output and answer, or a folder of sets with a train.json.")
    validation: File | None = Field(
        None, description="Held-out questions, or a folder of sets with a test.json; a share of train if not given."
    )
    tokens: Count = Field(32, description="Most tokens that the model writes, where evaluation.generate is on.")
    holdout: Share = Field(0.1, description="Share of the rows held out where there is no validation file.")
    rows: Count | None = Field(None, description="Most rows to train on, drawn by the seed.")


class PreferenceData(Section):
    """Prompts with a chosen answer and rejected ones, as texts or chat messages."""

    kind: Literal["preferences"]
    train: File = Field(description="JSON, JSONL, CSV or Parquet: prompt, chosen, and rejected, one answer or a list.")
    validation: File | None = Field(None, description="Held-out rows; a share of train where not given.")
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
    others: dict[str, File] = Field(
        {}, description="More files to measure on, of another domain, say, each by the name that its metrics get."
    )
    holdout: Share = Field(0.1, description="Share of the rows held out where there is no validation file.")
    rows: Count | None = Field(None, description="Most rows to train on, drawn by the seed.")


class GlueData(Section):
    """A task of GLUE (arXiv 1804.07461), with its own measures."""

    kind: Literal["glue"]
    task: Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"] = Field(
        description="Name of the task."
    )
    folder: File | None = Field(None, description="Where its files, or all tasks' folders, are; the hub if not given.")
    measure: Literal["dev", "holdout"] = Field(
        "dev", description="What to measure on: GLUE's dev part, or rows of train held out to choose settings by."
    )
    holdout: Share = Field(0.1, description="Share of train that is held out where measure is holdout.")
    rows: Count | None = Field(None, description="Most rows to train on, drawn by the seed.")
    others: dict[str, File] = Field(
        {},
        description="More files to measure on, of another domain, say, each by the name that its metrics get: with "
        "`sentence1`, `sentence2` where the task has two, and the task's labels by name in `label`; not for stsb.",
    )

    @model_validator(mode="after")
    def _others_have_labels(self) -> GlueData:
        """A file of values has no labels."""
        if self.others and self.task == "stsb":
            raise ValueError("others are files with labels, and task stsb has values: leave them out")
        return self


class SequenceData(Section):
    """Texts and what they become, for encoder-decoder models: summaries, translations."""

    kind: Literal["sequences"]
    train: File = Field(description="JSON, JSONL, CSV, TSV or Parquet with a column for each of the two texts.")
    validation: File | None = Field(None, description="Held-out rows; a share of train where not given.")
    source: str = Field("source", description="Column of the text that is read.")
    target: str = Field("target", description="Column of the text that is written.")
    prefix: str = Field("", description="Before each source, such as T5's 'summarize: '.")
    tokens: Count = Field(64, description="Most tokens of a target, and of what the model writes.")
    measures: list[Literal["ROUGE-1", "ROUGE-2", "ROUGE-L", "BLEU", "chrF"]] = Field(
        ["ROUGE-1", "ROUGE-2", "ROUGE-L"],
        min_length=1,
        description="Of what is written; BLEU and chrF need rankwise[sequences]. ROUGE counts words: in scripts "
        "without spaces between them, such as Chinese or Thai, characters.",
    )
    holdout: Share = Field(0.1, description="Share of the rows held out where there is no validation file.")
    rows: Count | None = Field(None, description="Most rows to train on, drawn by the seed.")


class RecommendationSettings(Section):
    """What interactions and published files have in common."""

    template: str = Field("films", description="A shipped template's name, or the path of your own.")
    chat: bool = Field(False, description="Write prompt and answer as a chat, by the model's template.")
    negatives: Count = Field(3, description="Most rejected answers of a training row.")
    candidates: int = Field(20, ge=2, description="Candidates of an evaluation case, the true one included.")
    rows: Count | None = Field(None, description="Most training rows, drawn by the seed.")


class InteractionData(RecommendationSettings):
    """A log of interactions with a table of items."""

    kind: Literal["interactions"]
    interactions: File = Field(description="Who, what, when: CSV, TSV, JSONL, Parquet or Arrow, or a folder of them.")
    form: str | None = Field(
        None,
        description="Of a folder as published: movielens-100k, movielens-1m, movielens, lastfm-1k, lastfm-2k, "
        "steam or goodreads.",
    )
    items: File | None = Field(None, description="What, and its title: a file or folder of the same kinds.")
    user: str | None = Field(None, description="Column of the user; a common name is found.")
    item: str | None = Field(None, description="Column of the item in the interactions; a common name is found.")
    time: str | None = Field(None, description="Column of the time, a number or ISO date; a common name is found.")
    rating: str | None = Field(None, description="Column of the rating; a common name is found.")
    item_id: str | None = Field(None, description="Column of the item in the items; a common name is found.")
    title: str | None = Field(None, description="Column of the title; a common name is found.")
    quoting: bool = Field(True, description="Whether quotes enclose the fields of CSV and TSV files.")
    minimum_rating: float | None = Field(None, description="Interactions rated lower are left out.")
    minimum_interactions: int = Field(3, ge=2, description="Users with fewer are left out.")
    core: Count = Field(1, description="Users and items with fewer are left out, again until there are none.")
    session_gap: Positive | None = Field(None, description="Seconds of rest after which a user's next session begins.")
    split: Literal["last", "time", "users", "given"] = Field(
        "last", description="Held out: each user's last items, what came latest, some users, or as 'part' tells."
    )
    validation_from: Moment | None = Field(None, description="Split by time: where validation begins, a date.")
    test_from: Moment | None = Field(None, description="Split by time: where test begins, a date.")
    holdout: Share = Field(0.1, description="Split by time or users: share held out for each of the two parts.")
    part: str | None = Field(None, description="Column of the part (train, validation, test), for split: given.")
    history: Count = Field(10, description="Most items of a history.")
    tidy_titles: bool = Field(False, description="Write 'Matrix, The (1999)' as 'The Matrix (1999)'.")

    @model_validator(mode="after")
    def _one_way(self) -> InteractionData:
        columns = ("items", "user", "item", "time", "rating", "item_id", "title")
        named = [name for name in columns if self.form and getattr(self, name) is not None]
        if named:
            raise ValueError(f"form {self.form} tells the files and columns: leave {', '.join(named)} out")
        if (self.split == "given") != (self.part is not None):
            raise ValueError("split: given and the column of the part go together")
        if self.split == "last" and self.minimum_interactions < 3:
            raise ValueError("minimum_interactions is at least 3 where each user's last two items are held out")
        return self


class SdpoData(RecommendationSettings):
    """The files of the S-DPO and LLaRA authors."""

    kind: Literal["sdpo"]
    train: File = Field(description="S-DPO's JSON, or LLaRA's JSONL windows.")
    validation: File = Field(description="S-DPO's JSON, or LLaRA's JSONL windows.")
    test: File = Field(description="S-DPO's JSON, or LLaRA's JSONL windows.")
    template: str = Field("artists-candidates", description="A shipped template's name, or the path of your own.")
    names: File | None = Field(None, description="LLaRA's id2name.txt, where windows are read.")


Data = Annotated[
    TextData
    | InstructionData
    | MathsData
    | ChoiceData
    | PreferenceData
    | ClassificationData
    | GlueData
    | SequenceData
    | InteractionData
    | SdpoData,
    Field(discriminator="kind"),
]
