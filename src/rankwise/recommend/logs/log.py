"""A log of any length, read, cleaned, split and sorted by user, in parts that fit into memory."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import polars as pl

from rankwise.errors import UserError
from rankwise.recommend.logs.cleaning import clean, core
from rankwise.recommend.logs.interactions import (
    STRAY,
    TWICE,
    UNTITLED,
)
from rankwise.recommend.logs.items import ItemColumns, items_as_titles, read_items
from rankwise.recommend.logs.parts import Part, Workshop, heights, load, scan, user_ranges
from rankwise.recommend.logs.runs import read_runs
from rankwise.recommend.logs.settings import LogSettings
from rankwise.recommend.logs.times import choose_unit
from rankwise.recommend.splits import (
    Case,
    cases_of,
    check_users,
    long_enough,
    time_cuts,
    with_parts,
)

Counts = dict[str, int]


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

    def pool(self, part: str) -> Sequence[str]:
        """The titles that wrong answers of a part's cases are drawn from.

        In a split by time these are, for training, those that were there by then: what comes later is not known, and a
        model would learn that it is never right.
        """
        return list(self.popularity) if part == "train" and self.settings.kind == "time" else self.catalogue

    def size(self, part: str) -> int:
        """How many cases a part of the split has."""
        return sum(sizes.get(part, 0) for sizes in self._sizes)

    def shares(self, part: str, picks: Sequence[int]) -> Iterator[tuple[Part, Sequence[int]]]:
        """Each part of the table with those of the cases in it that are picked, by their place in it."""
        start = 0
        for table, sizes in zip(self.parts, self._sizes, strict=True):
            stop = start + sizes.get(part, 0)
            some = picks[bisect_left(picks, start) : bisect_left(picks, stop)]
            if isinstance(some, range):  # of all cases: their places take no memory
                yield table, range(some.start - start, some.stop - start)
            else:
                yield table, [pick - start for pick in some]
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
    listed, item_counts = _listed(settings)
    runs = read_runs(settings, workshop)
    unit = choose_unit(settings.ratings, runs.units)
    items = items_as_titles(_ids(runs.parts), settings.tidy_titles) if listed is None else listed
    cleaner = partial(clean, unit=unit, items=items.select("item", "title"), gap=settings.session_gap)
    parts, found = workshop.each("clean", cleaner, user_ranges(runs.parts, runs.users, settings.rows_in_memory))
    cleaned = _sum(found)
    first = {name: cleaned.pop(name) for name in (STRAY, TWICE)}
    counts = runs.counts | first | item_counts | cleaned
    workshop.drop("runs")
    if counts[UNTITLED] and not sum(heights(parts)):
        raise UserError(f"{settings.ratings}: no item of the log is in the item list; check the item columns")
    if settings.core > 1:
        parts, core_counts = core(parts, settings.core, workshop)
        counts |= core_counts
        workshop.drop("clean")
    catalogue = scan(parts).select(pl.col("title").unique().sort()).collect(engine="streaming")["title"].to_list()
    if listed is None:  # what was left out is no item either
        items = items.filter(pl.col("title").is_in(catalogue))
    cuts = time_cuts(scan(parts), settings) if settings.kind == "time" else None
    parts, found = workshop.each("split", partial(_split, settings=settings, cuts=cuts), parts)
    counts |= _sum(found)
    workshop.drop("core" if settings.core > 1 else "clean")
    check_users(counts, settings.minimum_interactions)
    return Log(settings, parts, items, catalogue, counts, runs.broken)


def _listed(settings: LogSettings) -> tuple[pl.DataFrame | None, Counts]:
    """The list of items, where there is one."""
    if settings.items is not None:
        columns = replace(settings.item_columns or ItemColumns(), extra=settings.attributes)
        return read_items(settings.items, columns, settings.tidy_titles, settings.item_form, settings.quoting)
    if settings.attributes:
        raise UserError(f"the template tells {', '.join(settings.attributes)} of each item: give a table of items")
    return None, {}


def _ids(runs: Sequence[Part]) -> pl.Series:
    return scan(runs).select("item").unique(maintain_order=True).collect(engine="streaming")["item"]


def _sum(counts: Sequence[Counts]) -> Counts:
    """The counts of all parts together, zeros too."""
    return {name: sum(one[name] for one in counts) for name in counts[0]}


def _split(part: Part, settings: LogSettings, cuts: Any) -> tuple[pl.DataFrame, Counts]:
    kept, counts = long_enough(load(part), settings.minimum_interactions)
    return with_parts(kept, settings, cuts), counts
