"""Reading a log of any length: runs that are sorted by user, in memory where there is only one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import polars as pl

from rankwise.recommend.logs.interactions import check_some_left, count_read, rated_enough, read_log
from rankwise.recommend.logs.parts import Part, Workshop, batched, save
from rankwise.recommend.logs.reading.files import files
from rankwise.recommend.logs.settings import LogSettings
from rankwise.recommend.logs.times import count_units

LISTED = 100_000  # broken rows that are kept, at most
NO_BROKEN_ROWS = pl.DataFrame(schema={"file": pl.String, "row": pl.Int64, "reason": pl.String, "content": pl.String})
NOBODY = pl.DataFrame(schema={"user": pl.String, "len": pl.get_index_type()})


@dataclass(frozen=True)
class Runs:
    """Interactions as they were read.

    Attributes:
        parts: each sorted by user, and in the order of the files for each user.
        counts: of what was read and left out.
        broken: rows that could not be read: ``file``, ``row``, ``reason``, ``content``.
        units: how many times are in each unit, by their size.
        users: each ``user`` with the number of interactions, ``len``; one may be there several times.
    """

    parts: list[Part]
    counts: dict[str, int]
    broken: pl.DataFrame
    units: dict[str, int]
    users: pl.DataFrame


def read_runs(settings: LogSettings, workshop: Workshop) -> Runs:
    """Read a log; other machines, where there are any, read a file at a time.

    Raises:
        UserError: a file or column is wrong, or nothing is left.
    """
    folder = workshop.folder / "runs"
    folder.mkdir()
    found = list(enumerate(files(settings.ratings, settings.rating_form)))
    if not workshop.spread_out:
        results = [_read(found, settings, folder, in_memory=True)]
    else:
        work = partial(_read, settings=settings, folder=folder, in_memory=False)
        results = list(workshop.spread(work, [[file] for file in found]))
    counts: Counter[str] = Counter()
    units: Counter[str] = Counter()
    for one in results:
        counts.update(one.counts)
        units.update(one.units)
    check_some_left(settings.ratings, counts, settings.minimum_rating)
    read = [one for one in results if one.parts]
    parts = [part for one in read for part in one.parts]
    broken = pl.concat(one.broken for one in results).head(LISTED)
    return Runs(parts, dict(counts), broken, dict(units), pl.concat(one.users for one in read))


def _read(found: Sequence[tuple[int, Path]], settings: LogSettings, folder: Path, in_memory: bool) -> Runs:
    """Read some files of a log, which have numbers; a single run may stay ``in_memory``."""
    reader = _Reader(settings)
    units: Counter[str] = Counter()
    parts: list[Part] = []
    users: list[pl.DataFrame] = []
    waiting: pl.DataFrame | None = None

    def path() -> Path:
        return folder / f"{found[0][0]:05d}-{len(parts):05d}.parquet"

    for frame in batched((rows for _, file in found for rows in reader.rows(file)), settings.rows_in_memory):
        if waiting is not None:
            parts.append(save(waiting, path()))
        waiting = frame.sort("user", maintain_order=True)
        units.update(count_units(frame["time"]))
        users.append(frame.group_by("user").len())
    if waiting is not None:
        parts.append(waiting if in_memory and not parts else save(waiting, path()))
    broken = pl.concat(reader.broken) if reader.broken else NO_BROKEN_ROWS
    return Runs(parts, dict(reader.counts), broken, dict(units), pl.concat(users) if users else NOBODY)


class _Reader:
    """Reads files, and keeps what it counted and what was broken."""

    def __init__(self, settings: LogSettings) -> None:
        self.settings = settings
        self.counts: Counter[str] = Counter()
        self.broken: list[pl.DataFrame] = []

    def rows(self, path: Path) -> Iterator[pl.DataFrame]:
        """Interactions of a file that are rated high enough."""
        settings = self.settings
        rating: Literal["needed", "told", "unused"] = "told" if settings.ratings_shown else "unused"
        if settings.minimum_rating is not None:
            rating = "needed"
        columns, form = settings.rating_columns, settings.rating_form
        for whole, broken in read_log(path, columns, rating, form, settings.quoting):
            good = rated_enough(whole, settings.minimum_rating)
            self.counts.update(count_read(whole, broken, good))
            if sum(some.height for some in self.broken) < LISTED:
                self.broken.append(broken)
            if good.height:
                yield good.drop("row")
