"""From a log of interactions to rows with prompt, chosen and rejected answers, for any preference trainer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from rankwise.errors import UserError
from rankwise.files import new_folder, write_json, write_jsonl
from rankwise.recommend.candidates import cases_that_cannot_be_won, draw_negatives, with_candidates
from rankwise.recommend.interactions import (
    InteractionColumns,
    ItemColumns,
    attach_titles,
    read_interactions,
    read_items,
    tidy_title,
)
from rankwise.recommend.prompts import Template, load_template
from rankwise.recommend.splits import Case, leave_last_out
from rankwise.sampling import sample

Row = dict[str, Any]
_NOBODY = pl.DataFrame(schema={"user": pl.String, "titles": pl.List(pl.String)})
_NOTHING = pl.DataFrame(schema={"item": pl.String, "title": pl.String})


@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """How cases become rows; the same for a log and for published data."""

    candidates: int = 20  # in a case, the target included
    negatives: int = 3  # rejected answers of a row, drawn from its candidates
    training_rows: int | None = None  # at most, drawn by seed; none for all
    evaluation_cases: int | None = None  # of validation and of test, at most each, drawn by seed; none for all
    template: str | Path = "films"  # a shipped template's name or the path of one
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class InteractionSettings(RowSettings):
    """Everything that the rows of a log depend on."""

    ratings: Path  # the log: CSV, TSV, JSONL, NDJSON or Parquet
    items: Path | None = None  # item ids and titles; without it the log's items are titles themselves
    rating_columns: InteractionColumns = field(default_factory=InteractionColumns)
    item_columns: ItemColumns = field(default_factory=ItemColumns)
    tidy_titles: bool = False  # "Matrix, The (1999)" becomes "The Matrix (1999)"
    minimum_rating: float | None = None  # interactions rated lower are left out
    minimum_interactions: int = 3  # users with fewer are left out
    minimum_history: int = 1  # items before a training target, at least
    history: int = 10  # items in a prompt, at most


@dataclass(frozen=True, eq=False)  # frames have no truth value
class Prepared:
    """Rows of the three parts, the titles to rank, their popularity in training, and what was left out.

    ``histories`` has a row for each ``user`` of the log, with ``titles``: all that the user chose, the last two too,
    oldest first. ``items`` has each ``item`` (its id) with its ``title``, those that nobody chose too. Published files
    have neither users nor ids.

    A row of a part has ``user``, ``prompt``, ``chosen``, ``rejected`` (list), ``target``, ``history`` (titles) and
    ``seen`` (titles that are no wrong answers for this user: it is not written to files); a row of validation and test
    has ``candidates`` (titles, the target among them) too.
    """

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    catalogue: list[str]
    popularity: dict[str, int]
    counts: dict[str, int]
    most_history: int  # titles in a prompt
    histories: pl.DataFrame
    items: pl.DataFrame


def rows(
    cases: Iterable[Case], template: Template, negatives: int, seed: int, list_candidates: bool = True
) -> list[Row]:
    """One row a case; its ``negatives`` rejected answers are drawn by ``seed`` from its candidates.

    Raises:
        UserError: a case has too few candidates for the negatives.
    """
    return [_row(case, template, negatives, seed, list_candidates) for case in cases]


def _row(case: Case, template: Template, negatives: int, seed: int, list_candidates: bool) -> Row:
    row: Row = {
        "user": case.user,
        "prompt": template.render(case.history, case.candidates),
        "chosen": template.render_answer(case.target),
        "rejected": [template.render_answer(title) for title in draw_negatives(case, negatives, seed)],
        "target": case.target,
        "history": list(case.history),
        "seen": case.seen,
    }
    if list_candidates:
        row["candidates"] = list(case.candidates)
    return row


def build(
    parts: Mapping[str, Sequence[Case]],
    catalogue: Sequence[str],
    popularity: dict[str, int],
    counts: Mapping[str, int],
    settings: RowSettings,
    histories: pl.DataFrame = _NOBODY,
    items: pl.DataFrame = _NOTHING,
) -> Prepared:
    """Rows out of the cases of ``train``, ``validation`` and ``test``, sampled and counted."""
    template = load_template(settings.template)
    limits = {"train": settings.training_rows} | dict.fromkeys(("validation", "test"), settings.evaluation_cases)
    made: dict[str, list[Row]] = {}
    added: dict[str, int] = {}
    for name, limit in limits.items():
        sampled, left_out = sample(parts[name], limit, settings.seed)
        cases = with_candidates(sampled, catalogue, settings.candidates, settings.seed)
        made[name] = rows(cases, template, settings.negatives, settings.seed, list_candidates=name != "train")
        added |= {f"{name} rows": len(cases), f"{name} rows left out": left_out}
        if name != "train":
            added[f"{name} cases that cannot be won by substring"] = cases_that_cannot_be_won(cases)
    return Prepared(
        **made,
        catalogue=list(catalogue),
        popularity=popularity,
        counts={**counts, **added},
        most_history=max(len(case.history) for cases in parts.values() for case in cases),
        histories=histories,
        items=items,
    )


def prepare_interactions(settings: InteractionSettings) -> Prepared:
    """Read a log, split it by user in time, draw candidates and negatives, and render the rows.

    Raises:
        UserError: a file, column or setting is wrong, or nothing is left to train on.
    """
    check_rows(settings)
    log, items, counts = _titled_log(settings)
    split = leave_last_out(log, settings.history, settings.minimum_interactions, settings.minimum_history)
    if not split.train:
        raise UserError(
            f"{settings.ratings}: no training row: every user has only {settings.minimum_history} training"
            " items or fewer; give a longer log or a smaller minimum_history"
        )
    parts = {"train": split.train, "validation": split.validation, "test": split.test}
    return build(parts, split.catalogue, split.popularity, counts | split.counts, settings, user_histories(log), items)


def user_histories(log: pl.DataFrame) -> pl.DataFrame:
    """Each ``user`` of a log with the ``titles`` of all interactions, oldest first."""
    return log.sort("user", "time", maintain_order=True).group_by("user", maintain_order=True).agg(titles="title")


def check_rows(settings: RowSettings) -> None:
    """Refuse what can be refused before any file is read.

    Raises:
        UserError: the template, the candidates or the negatives are wrong.
    """
    load_template(settings.template)
    if settings.candidates < 2:
        raise UserError(f"candidates = {settings.candidates}: at least 2, the target and one other")
    if not 1 <= settings.negatives < settings.candidates:
        raise UserError(
            f"negatives = {settings.negatives}: between 1 and {settings.candidates - 1},"
            f" since they are drawn from {settings.candidates} candidates"
        )


def _titled_log(settings: InteractionSettings) -> tuple[pl.DataFrame, pl.DataFrame, dict[str, int]]:
    """The log with titles, the items, and the counts of both."""
    if settings.items is None:
        log, counts = read_interactions(settings.ratings, settings.rating_columns, settings.minimum_rating)
        items, item_counts = _items_as_titles(log, settings.tidy_titles), dict[str, int]()
    else:
        items, item_counts = read_items(settings.items, settings.item_columns, settings.tidy_titles)
        log, counts = read_interactions(settings.ratings, settings.rating_columns, settings.minimum_rating)
    titled, title_counts = attach_titles(log, items)
    return titled, items.select("item", "title"), counts | item_counts | title_counts


def _items_as_titles(log: pl.DataFrame, tidy: bool) -> pl.DataFrame:
    items = log.select(item="item", title=pl.col("item").str.replace_all(r"\s+", " "))
    items = items.unique("item", keep="first", maintain_order=True)
    return items.with_columns(pl.col("title").map_elements(tidy_title, return_dtype=pl.String)) if tidy else items


def write_rows(folder: Path, prepared: Prepared) -> Path:
    """Write ``train.jsonl``, ``validation.jsonl``, ``test.jsonl``, ``catalogue.json`` and ``counts.json``.

    The folder appears whole or not at all.

    Raises:
        UserError: the folder exists and is not empty.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: already there and not empty; choose another folder or remove it first")
    with new_folder(folder) as temporary:
        for name in ("train", "validation", "test"):
            written = ({key: row[key] for key in row if key != "seen"} for row in getattr(prepared, name))
            write_jsonl(temporary / f"{name}.jsonl", written)
        write_json(
            temporary / "catalogue.json",
            [{"title": t, "popularity": prepared.popularity.get(t, 0)} for t in prepared.catalogue],
        )
        write_json(temporary / "counts.json", prepared.counts)
    return folder
