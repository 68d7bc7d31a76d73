"""From a recipe's data section to a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from rankwise.errors import naming
from rankwise.recommend.chats import as_chat
from rankwise.recommend.logs.interactions import InteractionColumns
from rankwise.recommend.logs.items import ItemColumns
from rankwise.recommend.logs.known import known_log
from rankwise.recommend.prepare import InteractionSettings, prepare_interactions
from rankwise.recommend.prompts import Template, load_template
from rankwise.recommend.published import PublishedSettings, prepare_published
from rankwise.recommend.rows import Prepared
from rankwise.sampling import sample
from rankwise.schema import (
    ChoiceData,
    ClassificationData,
    GlueData,
    InstructionData,
    InteractionData,
    MathsData,
    PreferenceData,
    Recipe,
    RecommendationSettings,
    SdpoData,
    SequenceData,
    TextData,
)
from rankwise.tasks.answers import AnswerTask
from rankwise.tasks.choices import ChoiceTask, read_choices
from rankwise.tasks.classification import read_classification
from rankwise.tasks.forgetting import HeldOut
from rankwise.tasks.glue import TASKS, label_names, parts_of
from rankwise.tasks.instructions import FORM_READ, read_instructions
from rankwise.tasks.labels import LabelTask
from rankwise.tasks.noise import Noise, with_noise
from rankwise.tasks.preferences import PreferenceTask, read_preferences
from rankwise.tasks.problems import MathsTask, read_problems
from rankwise.tasks.recommendation import RecommendationTask
from rankwise.tasks.sequences import SequenceTask, read_sequences
from rankwise.tasks.splits import hold_out
from rankwise.tasks.task import Task
from rankwise.tasks.text import as_features, pack, read_documents
from rankwise.tokenise import encode_answers

Row = TypeVar("Row")
Counts = dict[str, int]


def load_task(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, context: int) -> Task:
    """Read and tokenise the data of a recipe.

    Raises:
        UserError: a file, a column or a row is not as it should be.
    """
    data = recipe.data
    if isinstance(data, RecommendationSettings):
        evaluation, template = recipe.evaluation, load_template(data.template)
        if data.chat:
            template = as_chat(template, tokenizer)
        return RecommendationTask(
            prepare(data, recipe.seed, evaluation.cases, template),
            template,
            tokenizer,
            recipe.model,
            context,
            split=evaluation.split,
            cases=evaluation.cases,
            catalogue_cases=evaluation.catalogue_cases,
            baselines=evaluation.baselines,
            generate=evaluation.generate,
            seed=recipe.seed,
        )
    if isinstance(data, TextData):
        return _text(recipe, data, tokenizer, context)
    if isinstance(data, InstructionData):
        return _instructions(recipe, data, tokenizer, context)
    if isinstance(data, MathsData):
        train, held_out, counts = _parts(recipe, data, lambda path: read_problems(Path(path), data.template))
        return MathsTask(train, held_out, tokenizer, recipe.model, context, counts, data.tokens)
    if isinstance(data, ChoiceData):
        return _choices(recipe, data, tokenizer, context)
    if isinstance(data, GlueData):
        return _glue(recipe, data, tokenizer, context)
    if isinstance(data, SequenceData):
        train, held_out, counts = _parts(
            recipe, data, lambda path: read_sequences(Path(path), data.source, data.target, data.prefix)
        )
        return SequenceTask(train, held_out, tokenizer, recipe.model, context, counts, data.measures, data.tokens)
    if isinstance(data, PreferenceData):
        train, held_out, counts = _parts(recipe, data, lambda path: read_preferences(Path(path)))
        return PreferenceTask(train, held_out, tokenizer, recipe.model, context, counts, recipe.seed)
    return _classification(recipe, data, tokenizer, context)


def held_out_elsewhere(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, context: int) -> HeldOut:
    """The texts and tasks on which a recipe's run measures what is forgotten."""
    wanted, tasks = recipe.evaluation, {}
    for name, data in wanted.tasks.items():
        with naming(f"evaluation.tasks.{name}"):
            tasks[name] = load_task(recipe.model_copy(update={"data": data}), tokenizer, context)
    return HeldOut(wanted.texts, tokenizer, context, wanted.text_rows, recipe.seed, tasks)


def prepare(
    data: RecommendationSettings, seed: int, cases: int | None = None, template: Template | None = None
) -> Prepared:
    """Rows for recommendation, from a log of interactions or from published files.

    Args:
        data: where they are.
        seed: of the draws.
        cases: of validation and of test, at most each.
        template: instead of the one that ``data`` names.
    """
    if isinstance(data, SdpoData):
        names = Path(data.names) if data.names else None
        train, validation, test = (Path(path) for path in (data.train, data.validation, data.test))
        settings = _row_settings(data, seed, cases, template)
        return prepare_published(
            PublishedSettings(train=train, validation=validation, test=test, names=names, **settings)
        )
    assert isinstance(data, InteractionData)
    return prepare_interactions(interaction_settings(data, seed, cases, template))


def interaction_settings(
    data: InteractionData, seed: int, cases: int | None = None, template: Template | None = None
) -> InteractionSettings:
    """What the section says, as the settings of :func:`rankwise.recommend.prepare.prepare_interactions`.

    The arguments are those of :func:`prepare`.
    """
    return InteractionSettings(
        **_log_files(data),
        tidy_titles=data.tidy_titles,
        minimum_rating=data.minimum_rating,
        minimum_interactions=data.minimum_interactions,
        core=data.core,
        session_gap=data.session_gap,
        kind=data.split,
        validation_from=data.validation_from,
        test_from=data.test_from,
        holdout=data.holdout,
        history=data.history,
        **_row_settings(data, seed, cases, template),
    )


def _log_files(data: InteractionData) -> dict[str, Any]:
    """Where a log is, and how it is written."""
    if data.form is None:
        return {
            "ratings": Path(data.interactions),
            "quoting": data.quoting,
            "items": Path(data.items) if data.items else None,
            "rating_columns": InteractionColumns(data.user, data.item, data.time, data.rating, data.part),
            "item_columns": ItemColumns(item=data.item_id, title=data.title),
        }
    known, ratings, items = known_log(data.form, Path(data.interactions))
    return {
        "ratings": ratings,
        "items": items,
        "rating_columns": replace(known.columns, part=data.part),
        "item_columns": known.item_columns,
        "rating_form": known.form,
        "item_form": known.item_form,
    }


def _row_settings(
    data: RecommendationSettings, seed: int, cases: int | None, template: Template | None
) -> dict[str, Any]:
    return {
        "template": template or data.template,
        "evaluation_cases": cases,
        "messages": data.chat,
        "negatives": data.negatives,
        "candidates": data.candidates,
        "training_rows": data.rows,
        "seed": seed,
    }


def _text(recipe: Recipe, data: TextData, tokenizer: PreTrainedTokenizerBase, context: int) -> Task:
    def read(path: str) -> tuple[list[str], dict[str, int]]:
        return read_documents(Path(path), column=data.column, separator=data.separator)

    def rows(documents: list[str]) -> list[dict[str, list[int]]]:
        return as_features(pack(documents, tokenizer, context))

    documents, counts = read(data.train)
    if data.validation is None and len(documents) == 1:  # one text without parts: some of its rows are held out
        train, held_out = hold_out(rows(documents), data.holdout, recipe.seed)
    else:
        parts, held_out_parts, counts = _parts(recipe, data, read)
        train, held_out = rows(parts), rows(held_out_parts)
    return AnswerTask("text", train, held_out, recipe.model, counts)


def _instructions(recipe: Recipe, data: InstructionData, tokenizer: PreTrainedTokenizerBase, context: int) -> Task:
    named = {"prompt": data.prompt, "completion": data.completion}
    mapping = {name: column for name, column in named.items() if column}

    def read(path: str) -> tuple[list[dict[str, str]], dict[str, int]]:
        found = read_instructions(
            Path(path), form=data.form, mapping=mapping, template=data.template, tokenizer=tokenizer
        )
        return found.rows, {**found.counts, f"{FORM_READ}{found.form}": len(found.rows)}

    train, held_out, counts = _parts(recipe, data, read)
    encoded, cut = encode_answers(train, tokenizer, context)
    held_out_rows, held_out_cut = encode_answers(held_out, tokenizer, context)
    counts |= {f"training {name}": count for name, count in cut.items()}
    counts |= {f"held-out: {name}": count for name, count in held_out_cut.items()}
    return AnswerTask("instructions", encoded, held_out_rows, recipe.model, counts)


def _classification(recipe: Recipe, data: ClassificationData, tokenizer: PreTrainedTokenizerBase, context: int) -> Task:
    labels: list[str] = []

    def read(path: str) -> tuple[list[dict[str, Any]], dict[str, int]]:
        found = read_classification(
            Path(path),
            sentence1=data.sentence1,
            sentence2=data.sentence2,
            label=data.label,
            label_names=labels or None,
            quoting=data.quoting,
        )
        labels[:] = found.label_names
        return found.rows, found.counts

    train, held_out, counts = _parts(recipe, data, read)
    others = _others(recipe, data.others, read, counts) | noisy(held_out, recipe)
    return LabelTask(train, held_out, labels, tokenizer, recipe.model, context, counts, others=others)


def _others(
    recipe: Recipe, files: Mapping[str, str], read: Callable[[str], tuple[list[Row], Counts]], counts: Counts
) -> dict[str, list[Row]]:
    """The rows of more files to measure on, by name; what was left out goes to the counts."""
    others = {}
    for name, path in files.items():
        rows, more = read(path)
        others[name], left_out = sample(rows, recipe.evaluation.cases, recipe.seed)
        counts |= {f"{name}: {what}": number for what, number in more.items()}
        counts |= {f"{name}: rows left out": left_out} if left_out else {}
    return others


def noisy(rows: list[dict[str, Any]], recipe: Recipe) -> dict[str, list[dict[str, Any]]]:
    """The rows with each kind of mistakes in their sentences that the recipe asks for, by the kind."""

    def changed(row: dict[str, Any], number: int, kind: Noise) -> dict[str, Any]:
        texts = {name: row[name] for name in ("sentence1", "sentence2") if name in row}
        share, seed = recipe.evaluation.noise_share, recipe.seed
        return row | {name: with_noise(text, kind, share, seed, number) for name, text in texts.items()}

    kinds = recipe.evaluation.noise
    return {kind: [changed(row, number, kind) for number, row in enumerate(rows)] for kind in kinds}


def _choices(recipe: Recipe, data: ChoiceData, tokenizer: PreTrainedTokenizerBase, context: int) -> Task:
    def read(part: str) -> Callable[[str], tuple[list[dict[str, Any]], Counts]]:
        return lambda path: read_choices(Path(path), part)

    train, held_out, counts = _parts(recipe, data, read("train"), read("test"))
    tokens = data.tokens if recipe.evaluation.generate else None
    return ChoiceTask(train, held_out, tokenizer, recipe.model, context, counts, recipe.seed, tokens)


def _glue(recipe: Recipe, data: GlueData, tokenizer: PreTrainedTokenizerBase, context: int) -> Task:
    parts = parts_of(data.task, Path(data.folder) if data.folder else None)
    counts = {f"{part}: {what}": number for part, (_, dropped) in parts.items() for what, number in dropped.items()}
    rows = {part: found for part, (found, _) in parts.items()}
    train = rows.pop("train")
    if data.measure == "holdout":
        train, held_out = hold_out(train, data.holdout, recipe.seed)
        rows = {"dev": held_out}
    train, counts["training rows left out"] = sample(train, data.rows, recipe.seed)
    for part, found in rows.items():
        rows[part], counts[f"{part}: rows left out"] = sample(found, recipe.evaluation.cases, recipe.seed)
    counts = {what: number for what, number in counts.items() if number}
    held_out, labels, metrics = rows.pop("dev"), label_names(data.task), TASKS[data.task].metrics

    def read(path: str) -> tuple[list[dict[str, Any]], Counts]:
        second = "sentence2" if len(TASKS[data.task].sentences[0]) > 1 else None
        found = read_classification(Path(path), sentence2=second, label_names=labels)
        return found.rows, found.counts

    others = rows | _others(recipe, data.others, read, counts) | noisy(held_out, recipe)
    return LabelTask(train, held_out, labels, tokenizer, recipe.model, context, counts, metrics, others)


def _parts(
    recipe: Recipe,
    data: TextData | InstructionData | MathsData | ChoiceData | PreferenceData | ClassificationData | SequenceData,
    read: Callable[[str], tuple[list[Row], Counts]],
    read_held_out: Callable[[str], tuple[list[Row], Counts]] | None = None,
) -> tuple[list[Row], list[Row], Counts]:
    """Training and held-out rows, each within its limit, and the counts of both."""
    train, counts = read(data.train)
    if data.validation:
        held_out, more = (read_held_out or read)(data.validation)
    else:
        train, held_out = hold_out(train, data.holdout, recipe.seed)
        more = {}
    train, left_out = sample(train, data.rows, recipe.seed)
    held_out, unused = sample(held_out, recipe.evaluation.cases, recipe.seed)
    named = {f"held-out: {name}": count for name, count in more.items()}
    limits = {"training rows left out": left_out, "held-out rows left out": unused}
    return train, held_out, {**counts, **named, **{name: count for name, count in limits.items() if count}}
