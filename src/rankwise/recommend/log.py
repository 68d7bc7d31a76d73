"""A log of any length, read, cleaned, split and sorted by user, in parts that fit into memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import polars as pl

from rankwise.errors import UserError
from rankwise.recommend.cleaning import clean, core
from rankwise.recommend.interactions import (
    STRAY,
    TWICE,
    UNTITLED,
    InteractionColumns,
    check_some_left,
    count_read,
    rated_enough,
    read_log,
)
from rankwise.recommend.items import ItemColumns, items_as_titles, read_items
from rankwise.recommend.parts import Part, Workshop, batched, heights, load, save, scan, user_ranges
from rankwise.recommend.reading import Form
from rankwise.recommend.reading.files import files
from rankwise.recommend.splits import (
    Case,
    SplitSettings,
    cases_of,
    check_users,
    long_enough,
    time_cuts,
    with_parts,
)
from rankwise.recommend.times import choose_unit, count_units

Counts = dict[str, int]
LISTED = 100_000  # broken rows that are kept, at most


@dataclass(frozen=True, kw_only=True)
class LogSettings(SplitSettings):
    """What a log is, and what is to become of it."""

    ratings: Path  # the log: a file or a folder of files
    items: Path | None = None  # item ids and titles; without it the log's items are titles themselves
    rating_columns: InteractionColumns = field(default_factory=InteractionColumns)
    item_columns: ItemColumns | None = None
    rating_form: Form | None = None  # how the files are written; by default as their suffixes say
    item_form: Form | None = None
    tidy_titles: bool = False  # "Matrix, The (1999)" becomes "The Matrix (1999)"
    minimum_rating: float | None = None  # interactions rated lower are left out
    core: int = 1  # users and items with fewer interactions than this are left out, until there are none
    session_gap: float | None = None  # seconds without an interaction after which a user's next session begins
    rows_in_memory: int = 4_000_000  # interactions that are worked on together
    attributes: tuple[str, ...] = ()  # further columns of the items, for the template
    ratings_shown: bool = False  # whether the template tells ratings


@dataclass(frozen=True)
class Log:
    """A split log.

    Attributes:
        parts: interactions, with ``user`` (of a session: its name), ``title``, ``time``, ``part`` and ``case``, by user
            and time.
        items: each ``item`` (its id) with its ``title`` and further columns, those that nobody chose too.
        catalogue: the sorted titles of the log, of users that are left out too.
        counts: what was read and left out.
        broken: the rows that could not be read, a hundred thousand at most: ``file``, ``row``, ``reason``, ``content``.
    """

    settings: LogSettings
    parts: Sequence[Part]
    items: pl.DataFrame
    catalogue: Sequence[str]
    counts: Counts
    broken: pl.DataFrame

    @cached_property
    def _sizes(self) -> list[dict[str, int]]:
        """Of each part of the table: cases by part of the split."""
        return [_sizes(part) for part in self.parts]

    @cached_property
    def popularity(self) -> dict[str, int]:
        """How often each title is in the training part."""
        counted = scan(self.parts).filter(pl.col("part") == "train").group_by("title").len().sort("title")
        return dict(counted.collect(engine="streaming").iter_rows())

    @cached_property
    def most_history(self) -> int:
        """The most items before a case's target that a prompt can tell."""
        most = scan(self.parts).filter("case").select(pl.col("position").max()).collect(engine="streaming").item()
        return min(int(most or 0), self.settings.history)

    @cached_property
    def attributes(self) -> dict[str, dict[str, str | None]]:
        """What the template tells of each title; of items that share one, that of the first."""
        if not self.settings.attributes:
            return {}
        first = self.items.unique("title", keep="first", maintain_order=True).select("title", *self.settings.attributes)
        return {str(row.pop("title")): row for row in first.iter_rows(named=True)}

    @cached_property
    def histories(self) -> pl.DataFrame:
        """Each ``user`` with the ``titles`` of all interactions, oldest first; of the last session where there are.

        And their ``ratings``, where the template tells them.
        """
        names = {"titles": "title"} | ({"ratings": "rating"} if self.settings.ratings_shown else {})
        return pl.concat(_histories(load(part), names) for part in self.parts)

    def size(self, part: str) -> int:
        """How many cases a part of the split has."""
        return sum(sizes.get(part, 0) for sizes in self._sizes)

    def shares(self, part: str, picks: Sequence[int]) -> Iterator[tuple[Part, list[int]]]:
        """Each part of the table with those of the cases in it that are picked, by their place in it."""
        start = at = 0
        for table, sizes in zip(self.parts, self._sizes, strict=True):
            stop, first = start + sizes.get(part, 0), at
            while at < len(picks) and picks[at] < stop:
                at += 1
            yield table, [pick - start for pick in picks[first:at]]
            start = stop

    def cases(self, part: str, picks: Sequence[int]) -> Iterator[Case]:
        """The cases of a part of the split, by user and time, that are picked (by place and in order)."""
        for table, some in self.shares(part, picks):
            if some:
                yield from cases_of(load(table), part, self.settings.history, some)


def _sizes(part: Part) -> dict[str, int]:
    return dict(scan([part]).filter("case").group_by("part").len().collect().iter_rows())


def _histories(log: pl.DataFrame, names: dict[str, str]) -> pl.DataFrame:
    if "person" not in log.columns:
        return log.group_by("user", maintain_order=True).agg(**names)
    last = log.filter(pl.col("user") == pl.col("user").last().over("person"))
    return last.group_by(user="person", maintain_order=True).agg(**names)


def open_log(settings: LogSettings, workshop: Workshop) -> Log:
    """Read a log and make of it what the settings say.

    Raises:
        UserError: a file, column or setting is wrong, or nothing is left.
    """
    counts: Counts = {}
    listed = None
    if settings.items is not None:
        columns = replace(settings.item_columns or ItemColumns(), extra=settings.attributes)
        listed, item_counts = read_items(settings.items, columns, settings.tidy_titles, settings.item_form)
    elif settings.attributes:
        raise UserError(f"the template tells {', '.join(settings.attributes)} of each item: give a table of items")
    runs, read, broken, units, users = _read(settings, workshop)
    counts |= read
    unit = choose_unit(settings.ratings, units)
    if listed is None:
        ids = scan(runs).select("item").unique(maintain_order=True).collect(engine="streaming")["item"]
        items, item_counts = items_as_titles(ids, settings.tidy_titles), {}
    else:
        items = listed
    cleaner = partial(clean, unit=unit, items=items.select("item", "title"), gap=settings.session_gap)
    parts, more = workshop.each("clean", cleaner, user_ranges(runs, users, settings.rows_in_memory))
    cleaned = _sum(more)
    counts |= {name: cleaned[name] for name in (STRAY, TWICE)} | item_counts
    counts |= {name: count for name, count in cleaned.items() if name not in (STRAY, TWICE)}
    if cleaned[UNTITLED] and not sum(heights(parts)):
        raise UserError(f"{settings.ratings}: no item of the log is in the item list; check the item columns")
    if settings.core > 1:
        parts, core_counts = core(parts, settings.core, workshop)
        counts |= core_counts
    catalogue = scan(parts).select(pl.col("title").unique().sort()).collect(engine="streaming")["title"].to_list()
    cuts = time_cuts(scan(parts), settings) if settings.kind == "time" else None
    parts, more = workshop.each("split", partial(_split, settings=settings, cuts=cuts), parts)
    counts |= _sum(more)
    check_users(counts, settings.minimum_interactions)
    return Log(settings, parts, items, catalogue, counts, broken)


def _sum(counts: Sequence[Counts]) -> Counts:
    """The counts of all parts together, zeros too."""
    return {name: sum(one[name] for one in counts) for name in counts[0]}


Read = tuple[list[Part], Counts, pl.DataFrame, Counts, pl.DataFrame]


def _read(settings: LogSettings, workshop: Workshop) -> Read:
    """Runs of interactions sorted by user, counts, broken rows, times by unit, and interactions by user."""
    folder = workshop.folder / "runs"
    folder.mkdir()
    found = list(enumerate(files(settings.ratings, settings.rating_form)))
    if not workshop.spread_out:
        results = [read_runs(found, settings, folder, in_memory=True)]
    else:
        work = partial(read_runs, settings=settings, folder=folder, in_memory=False)
        results = list(workshop.spread(work, [[file] for file in found]))
    total: Counter[str] = Counter()
    units: Counter[str] = Counter()
    for _, counts, _, unit_counts, _ in results:
        total.update(counts)
        units.update(unit_counts)
    check_some_left(settings.ratings, total, settings.minimum_rating)
    runs = [run for result in results for run in result[0]]
    broken = pl.concat(result[2] for result in results).head(LISTED)
    return runs, dict(total), broken, dict(units), pl.concat(result[4] for result in results)


def read_runs(found: Sequence[tuple[int, Path]], settings: LogSettings, folder: Path, in_memory: bool) -> Read:
    """Read some files of a log, which have numbers; a single run may stay ``in_memory``."""
    counts: Counter[str] = Counter()
    broken: list[pl.DataFrame] = []

    def rated() -> Iterator[pl.DataFrame]:
        for _, path in found:
            columns, wanted = settings.rating_columns, settings.ratings_shown or settings.minimum_rating is not None
            for whole, unread in read_log(path, columns, wanted, settings.rating_form):
                good = rated_enough(whole, settings.minimum_rating)
                counts.update(count_read(whole, unread, good))
                if sum(some.height for some in broken) < LISTED:
                    broken.append(unread)
                yield good.drop("row")

    runs: list[Part] = []
    units: Counter[str] = Counter()
    users: list[pl.DataFrame] = []
    waiting: pl.DataFrame | None = None
    for frame in batched(rated(), settings.rows_in_memory):
        if waiting is not None:
            runs.append(save(waiting, folder / f"{found[0][0]:05d}-{len(runs):05d}.parquet"))
        waiting = frame.sort("user", maintain_order=True)
        units.update(count_units(frame["time"]))
        users.append(frame.group_by("user").len())
    assert waiting is not None
    last = folder / f"{found[0][0]:05d}-{len(runs):05d}.parquet"
    runs.append(waiting if in_memory and not runs else save(waiting, last))
    return runs, dict(counts), pl.concat(broken), dict(units), pl.concat(users)


def _split(part: Part, settings: LogSettings, cuts: Any) -> tuple[pl.DataFrame, Counts]:
    kept, counts = long_enough(load(part), settings.minimum_interactions)
    return with_parts(kept, settings, cuts), counts
