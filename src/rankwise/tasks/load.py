"""From a recipe's data section to a task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rankwise.errors import UserError
from rankwise.recommend.interactions import InteractionColumns, ItemColumns
from rankwise.recommend.prepare import InteractionSettings, Prepared, prepare_interactions
from rankwise.recommend.prompts import load_template
from rankwise.recommend.published import PublishedSettings, prepare_published
from rankwise.schema import (
    ClassificationData,
    InstructionData,
    InteractionData,
    Recipe,
    RecommendationSettings,
    SdpoData,
    TextData,
)
from rankwise.tasks.answers import AnswerTask
from rankwise.tasks.classification import Classification, read_classification
from rankwise.tasks.instructions import read_instructions
from rankwise.tasks.labels import LabelTask
from rankwise.tasks.recommendation import RecommendationTask
from rankwise.tasks.splits import hold_out
from rankwise.tasks.task import Task
from rankwise.tasks.text import as_features, pack, read_documents
from rankwise.tokenise import encode_answers


def check_files(data: object) -> None:
    """Raise a ``UserError`` for the first file of a data section that does not exist."""
    for name in ("interactions", "items", "train", "validation", "test", "names"):
        path = getattr(data, name, None)
        if path is not None and not Path(path).is_file():
            raise UserError(f"data.{name} {path} does not exist: give a file's path, from the folder you are in")


def load_task(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, context: int) -> Task:
    """Read and tokenise the data of a recipe.

    Raises:
        UserError: a file, a column or a row is not as it should be.
    """
    data = recipe.data
    if isinstance(data, RecommendationSettings):
        evaluation = recipe.evaluation
        return RecommendationTask(
            prepare(data, recipe.seed),
            load_template(data.template),
            tokenizer,
            recipe.model.path,
            context,
            split=evaluation.split,
            cases=evaluation.cases,
            generate=evaluation.generate,
            seed=recipe.seed,
        )
    if isinstance(data, TextData):
        return _text(recipe, data, tokenizer, context)
    if isinstance(data, InstructionData):
        return _instructions(recipe, data, tokenizer, context)
    return _classification(recipe, data, tokenizer, context)


def prepare(data: RecommendationSettings, seed: int) -> Prepared:
    """Rows for recommendation, from a log of interactions or from published files."""
    common: dict[str, Any] = {
        "template": data.template,
        "negatives": data.negatives,
        "candidates": data.candidates,
        "training_rows": data.rows,
        "seed": seed,
    }
    if isinstance(data, SdpoData):
        names = Path(data.names) if data.names else None
        train, validation, test = (Path(path) for path in (data.train, data.validation, data.test))
        return prepare_published(
            PublishedSettings(train=train, validation=validation, test=test, names=names, **common)
        )
    assert isinstance(data, InteractionData)
    columns = InteractionColumns(user=data.user, item=data.item, time=data.time, rating=data.rating)
    return prepare_interactions(
        InteractionSettings(
            ratings=Path(data.interactions),
            items=Path(data.items) if data.items else None,
            rating_columns=columns,
            item_columns=ItemColumns(item=data.item_id, title=data.title),
            tidy_titles=data.tidy_titles,
            minimum_rating=data.minimum_rating,
            minimum_interactions=data.minimum_interactions,
            history=data.history,
            **common,
        )
    )


def _text(recipe: Recipe, data: TextData, tokenizer: PreTrainedTokenizerBase, context: int) -> Task:
    def read(path: str) -> tuple[list[str], dict[str, int]]:
        return read_documents(Path(path), column=data.column, separator=data.separator)

    train, counts = read(data.train)
    held_out, more = read(data.validation) if data.validation else ([], {})
    if not data.validation:
        train, held_out = hold_out(train, data.holdout, recipe.seed)
    train, left_out = _limit(train, data.rows, recipe.seed)
    rows, held_out_rows = (as_features(pack(part, tokenizer, context)) for part in (train, held_out))
    return AnswerTask("text", rows, held_out_rows, recipe.model.path, _counts(counts, more, left_out))


def _instructions(recipe: Recipe, data: InstructionData, tokenizer: PreTrainedTokenizerBase, context: int) -> Task:
    def read(path: str) -> tuple[list[dict[str, str]], dict[str, int]]:
        found = read_instructions(
            Path(path), form=data.form, mapping=mapping, template=data.template, tokenizer=tokenizer
        )
        return found.rows, {**found.counts, f"rows of the form {found.form}": len(found.rows)}

    named = {"prompt": data.prompt, "completion": data.completion}
    mapping = {name: column for name, column in named.items() if column}
    train, counts = read(data.train)
    held_out, more = read(data.validation) if data.validation else ([], {})
    if not data.validation:
        train, held_out = hold_out(train, data.holdout, recipe.seed)
    train, left_out = _limit(train, data.rows, recipe.seed)
    encoded, cut = encode_answers(train, tokenizer, context)
    held_out_rows, held_out_cut = encode_answers(held_out, tokenizer, context)
    counts |= {f"training {name}": count for name, count in cut.items()}
    more |= {name: count for name, count in held_out_cut.items()}
    return AnswerTask("instructions", encoded, held_out_rows, recipe.model.path, _counts(counts, more, left_out))


def _classification(recipe: Recipe, data: ClassificationData, tokenizer: PreTrainedTokenizerBase, context: int) -> Task:
    def read(path: str, names: list[str] | None = None) -> Classification:
        return read_classification(
            Path(path),
            sentence1=data.sentence1,
            sentence2=data.sentence2,
            label=data.label,
            label_names=names,
            quoting=data.quoting,
        )

    found = read(data.train)
    train, counts = found.rows, found.counts
    held_out, _, more = read(data.validation, found.label_names) if data.validation else ([], [], {})
    if not data.validation:
        train, held_out = hold_out(train, data.holdout, recipe.seed)
    train, left_out = _limit(train, data.rows, recipe.seed)
    merged = _counts(counts, more, left_out)
    return LabelTask(train, held_out, found.label_names, tokenizer, recipe.model.path, context, merged)


def _limit(rows: list[Any], limit: int | None, seed: int) -> tuple[list[Any], int]:
    """At most ``limit`` rows, drawn by ``seed``, and how many were left out."""
    if limit is None or limit >= len(rows):
        return rows, 0
    kept, _ = hold_out(rows, len(rows) - limit, seed + 1)
    return kept, len(rows) - limit


def _counts(train: dict[str, int], held_out: dict[str, int], left_out: int) -> dict[str, int]:
    named = {f"held-out: {name}": count for name, count in held_out.items()}
    return {**train, **named, **({"training rows left out": left_out} if left_out else {})}
