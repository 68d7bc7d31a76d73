"""What of a log is left out: repeated interactions, items without title, users and items with too little."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import polars as pl

from rankwise.errors import UserError
from rankwise.recommend.logs.interactions import TWICE, attach_titles, clean_times, drop_duplicates
from rankwise.recommend.logs.parts import Part, UserRange, Workshop, heights, load, scan

Counts = dict[str, int]


def clean(users: UserRange, unit: str, items: pl.DataFrame, gap: float | None) -> tuple[pl.DataFrame, Counts]:
    """Of some users: one interaction for each title, in the order of time.

    Args:
        users: which of them, and where their interactions are.
        unit: of the times.
        items: each ``item`` with its ``title``.
        gap: between two sessions, in seconds; an item may return in another session.
    """
    timed, counts = clean_times(users.load(), unit)
    ordered = timed.sort("user", "time", maintain_order=True)
    if gap is not None:
        ordered = sessions(ordered, gap)
    once = drop_duplicates(ordered, "item")
    titled, title_counts = attach_titles(once, items)
    return titled.drop("item"), counts | {TWICE: timed.height - once.height} | title_counts


def sessions(log: pl.DataFrame, gap: float) -> pl.DataFrame:
    """Each user's interactions as sessions: ``user`` becomes ``42/1``, ``42/2`` and so on, ``person`` stays 42.

    Args:
        log: by user and time.
        gap: seconds; the next session begins with an interaction that comes later than that after the one before.
    """
    begins = (pl.col("time").diff() > gap).fill_null(False).cum_sum().over("user") + 1
    return log.with_columns(person="user").with_columns(user=pl.format("{}/{}", "user", begins))


def core(parts: Sequence[Part], least: int, workshop: Workshop) -> tuple[list[Part], Counts]:
    """Leave users and items with fewer than ``least`` interactions out, again and again until there are none.

    Raises:
        UserError: nothing is left.
    """
    kept, rounds, before = scan(parts), 0, sum(heights(parts))
    left, found = before + 1, before
    users = items = pl.DataFrame()
    while found < left:
        users, items = (_frequent(kept, name, least) for name in ("user", "title"))
        kept = scan(parts).join(users.lazy(), on="user", how="semi").join(items.lazy(), on="title", how="semi")
        left, found, rounds = found, int(kept.select(pl.len()).collect(engine="streaming").item()), rounds + 1
    if not found:
        raise UserError(f"core = {least}: no user and item with as many interactions is left; lower it")
    made, _ = workshop.each("core", partial(_keep, users=users, items=items), list(parts))
    return made, {f"interactions outside the {least}-core": before - found, f"rounds to the {least}-core": rounds}


def _frequent(log: pl.LazyFrame, name: str, least: int) -> pl.DataFrame:
    counted = log.group_by(name).len().filter(pl.col("len") >= least)
    return counted.select(name).collect(engine="streaming")


def _keep(part: Part, users: pl.DataFrame, items: pl.DataFrame) -> tuple[pl.DataFrame, None]:
    """Of a part, the interactions of some users with some items."""
    log = load(part).join(users, on="user", how="semi", maintain_order="left")
    return log.join(items, on="title", how="semi", maintain_order="left"), None
