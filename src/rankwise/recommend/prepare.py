"""From a log of interactions to rows with prompt, chosen and rejected answers, in memory or as files."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import polars as pl

from rankwise.errors import UserError
from rankwise.files import new_folder, write_jsonl
from rankwise.recommend.logs.leaks import leaks
from rankwise.recommend.logs.log import Log, open_log
from rankwise.recommend.logs.parts import Part, Spread, Workshop, load, scan
from rankwise.recommend.logs.settings import LogSettings
from rankwise.recommend.prompts import load_template
from rankwise.recommend.rows import (
    UNWINNABLE,
    About,
    Prepared,
    RowSettings,
    build,
    check_new,
    check_rows,
    make_rows,
    picked,
    write_about,
    written,
)
from rankwise.recommend.splits import PARTS, cases_of, check_split


@dataclass(frozen=True, kw_only=True)
class InteractionSettings(LogSettings, RowSettings):
    """Everything that the rows of a log depend on."""


def prepare_interactions(settings: InteractionSettings) -> Prepared:
    """Read a log, split it, draw candidates and negatives, and render the rows.

    Raises:
        UserError: a file, column or setting is wrong, or nothing is left to train on.
    """
    with _opened(settings) as log:
        return build(
            log,
            settings,
            log.counts,
            attributes=log.attributes,
            popularity=log.popularity,
            most_history=log.most_history,
            histories=log.histories,
            items=log.items,
            broken=log.broken,
            leaks=leaks(log.parts),
        )


@dataclass(frozen=True)
class WrittenRows:
    """What was written of a log, and what was left out."""

    folder: Path
    counts: dict[str, int]
    leaks: dict[str, int]


def write_interactions(folder: Path, settings: InteractionSettings, spread: Spread = map) -> WrittenRows:
    """Write what :func:`prepare_interactions` makes as :func:`rankwise.recommend.rows.write_rows` does.

    A log of any length takes the memory of ``rows_in_memory`` interactions, of the titles, and of what is counted by
    user; while it is worked on, its interactions lie up to twice in a temporary folder beside.

    Args:
        folder: new or empty; it appears whole or not at all.
        settings: of the log and its rows.
        spread: how the work on the log's parts is done; see :func:`rankwise.recommend.cluster.over_cluster`.

    Raises:
        UserError: as :func:`prepare_interactions`, or the folder exists and is not empty.
    """
    folder = Path(folder).resolve()  # other machines may be in another folder
    settings = replace(
        settings,
        template=load_template(settings.template),
        ratings=Path(settings.ratings).resolve(),
        items=None if settings.items is None else Path(settings.items).resolve(),
    )
    check_new(folder)
    with new_folder(folder) as made, _opened(settings, made, spread) as log:
        counts, found = dict(log.counts), leaks(log.parts)
        shards = made / "shards"
        shards.mkdir()
        for part in PARTS:
            counts |= _write_part(made / f"{part}.jsonl", shards, log, part, settings, spread)
        shards.rmdir()
        write_about(made, log.catalogue, log.popularity, counts, found, log.broken)
    return WrittenRows(folder, counts, found)


def _write_part(
    path: Path, shards: Path, log: Log, part: str, settings: InteractionSettings, spread: Spread
) -> dict[str, int]:
    chosen, counts = picked(log, part, settings)
    if part != "train":
        counts[UNWINNABLE.format(part)] = 0
    share = partial(_write_share, part=part, pool=log.pool(part), about=log.attributes, settings=settings)
    work = [(shards / f"{part}-{at:05d}.jsonl", *one) for at, one in enumerate(log.shares(part, chosen)) if one[1]]
    with path.open("xb") as whole:
        for shard, more in spread(share, work):
            counts |= {name: counts.get(name, 0) + count for name, count in more.items()}
            with shard.open("rb") as rows:
                shutil.copyfileobj(rows, whole)
            shard.unlink()
    return counts


def _write_share(
    share: tuple[Path, Part, Sequence[int]],
    part: str,
    pool: Sequence[str],
    about: About,
    settings: InteractionSettings,
) -> tuple[Path, dict[str, int]]:
    path, table, chosen = share
    counts: dict[str, int] = {}
    cases = cases_of(load(table), part, settings.history, chosen)
    rows = make_rows(cases, part, pool, settings, counts, about)
    write_jsonl(path, (written(row, settings.messages) for row in rows))
    return path, counts


@contextmanager
def _opened(settings: InteractionSettings, beside: Path | None = None, spread: Spread = map) -> Iterator[Log]:
    """The log, with a folder for its parts that is removed in the end.

    Raises:
        UserError: nothing is left to train on.
    """
    check_rows(settings)
    check_split(settings)
    template = load_template(settings.template)
    settings = replace(settings, attributes=template.attributes, ratings_shown=template.shows_ratings)
    with tempfile.TemporaryDirectory(prefix=".log-", dir=beside) as folder:
        log = open_log(settings, Workshop(Path(folder), spread, spread_out=spread is not map))
        _check_parts(log)
        yield log


def _check_parts(log: Log) -> None:
    """Refuse a split that leaves a part without a case.

    Raises:
        UserError: it does.
    """
    settings = log.settings
    if not log.size("train"):
        raise UserError(
            f"{settings.ratings}: no training row: no user has more than {settings.minimum_history} training items;"
            " give a longer log or a smaller minimum_history"
        )
    needed = ("test",) if settings.kind == "given" else ("validation", "test")
    empty = [part for part in needed if not log.size(part)]
    if empty:
        first, last = scan(log.parts).select(first=pl.col("time").min(), last=pl.col("time").max()).collect().row(0)
        raise UserError(
            f"{settings.ratings}: the split by {settings.kind} leaves no {empty[0]} case with a history; times go from"
            f" {first:.0f} to {last:.0f} seconds: choose other dates, a larger holdout, or another split"
        )
