"""Logs of interactions, from files with any column names to normalised tables.

Nothing is lost in silence: what is read comes with counts (rows read, dropped by reason, kept) and the broken rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import polars as pl

from rankwise.errors import UserError
from rankwise.recommend.logs.items import ITEM, blank_to_null
from rankwise.recommend.logs.reading import ROW, Form, find_column, read_batches
from rankwise.recommend.logs.reading.files import NO_ROWS
from rankwise.recommend.logs.reading.text import broken_rows
from rankwise.recommend.logs.times import UNITS, choose_unit, count_units, number, parse_times, unit_of

_COMMON = {
    "user": ("user", "user_id", "uid", "customer_id", "reviewer_id", "visitor_id"),
    "item": ITEM,
    "time": ("time", "timestamp", "datetime", "date", "ts", "unix_review_time"),
    "rating": ("rating", "stars", "score", "overall"),
}
READ, UNPARSABLE, LOW = "interactions read", "unparsable rows", "interactions below the rating"
STRAY, TWICE = "interactions with a time in another unit", "duplicate interactions"
UNTITLED = "interactions with an item without title"


@dataclass(frozen=True)
class InteractionColumns:
    """The column names of a log; ``None`` finds it by a common name, such as ``userId`` or ``movie_id``."""

    user: str | None = None
    item: str | None = None
    time: str | None = None  # a number since 1970 (or any other that grows), or ISO 8601 text; no zone means UTC
    rating: str | None = None  # optional in the log
    part: str | None = None  # the part of each interaction, where the log tells it
    time_form: str | None = None  # of dates that are not ISO 8601: %a %b %d %H:%M:%S %z %Y


def read_log(
    path: Path,
    columns: InteractionColumns,
    rating: Literal["needed", "told", "unused"],
    form: Form | None = None,
    quoting: bool = True,
) -> Iterator[tuple[pl.DataFrame, pl.DataFrame]]:
    """The whole rows and the broken ones of a log, a batch at a time.

    Whole rows have ``row`` (their number in the file), ``user, item`` (text), ``time`` and, where they are named or
    wanted, ``rating`` and ``part``. Broken are rows with no user or item, with a time or rating that is none, and
    lines that :func:`rankwise.recommend.logs.reading.read_batches` cannot read: ``file``, ``row``, ``reason`` and
    ``content``.

    Args:
        path: a file or a folder.
        columns: of it; a rating that is named is needed.
        rating: whether each row needs one, it is read where it is there, or only where ``columns`` names it.
        form: how files are written that their suffix does not tell.
        quoting: whether quotes enclose fields.

    Raises:
        UserError: the file or a column is missing, or the file is empty.
    """
    names: dict[Path, dict[str, str]] = {}  # of each file, in which they may differ

    def chosen(found: Sequence[str]) -> Collection[str]:
        return _names(path, list(found), columns, rating).values()

    for batch in read_batches(path, form, quoting, chosen):
        if batch.path not in names and batch.table.width > 1:
            names[batch.path] = _names(batch.path, batch.table.drop(ROW).columns, columns, rating)
        own = names.get(batch.path, {})  # none where all is broken so far
        needed = [role for role in own if role != "rating" or rating == "needed" or columns.rating is not None]
        whole, unparsable = _parse(batch.table, own, needed, columns.time_form) if own else (_NOTHING, _NO_REASON)
        broken = pl.concat([batch.broken, unparsable]).sort("row")
        yield whole, broken.insert_column(0, pl.Series("file", [batch.path.name] * broken.height, dtype=pl.String))


def _names(path: Path, found: list[str], columns: InteractionColumns, rating: str) -> dict[str, str]:
    """The column of each role."""
    roles = ["user", "item", "time"]
    if rating != "unused" or columns.rating is not None:  # otherwise an empty rating harms no row
        roles.append("rating")
    if columns.part is not None:
        roles.append("part")
    return {role: find_column(path, found, role, getattr(columns, role), _COMMON.get(role, ())) for role in roles}


def _parse(
    table: pl.DataFrame, names: Mapping[str, str], needed: Sequence[str], time_form: str | None
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The rows in which every column of a ``needed`` role has a value of its kind, and the others."""
    missing = [name for name in names.values() if name not in table.columns]
    table = table.with_columns(pl.lit(None, dtype=pl.String).alias(name) for name in missing)
    parsed = table.select(
        pl.col(ROW).alias("row"),
        blank_to_null(names["user"]).alias("user"),
        blank_to_null(names["item"]).alias("item"),
        parse_times(table[names["time"]], time_form).alias("time"),
        *([number(pl.col(names["rating"])).alias("rating")] if "rating" in names else []),
        *([blank_to_null(names["part"]).alias("part")] if "part" in names else []),
    )
    reason = pl.lit(None, dtype=pl.String)
    for role in reversed(needed):
        reason = pl.when(pl.col(role).is_null()).then(pl.lit(f"no valid {role}")).otherwise(reason)
    reasons = parsed.select(reason.alias("reason"))["reason"]
    if reasons.null_count() == len(reasons):
        return parsed, _NO_REASON
    unparsable = [broken_rows(table.filter(reasons == why), why) for why in reasons.unique().drop_nulls().sort()]
    return parsed.filter(reasons.is_null()), pl.concat(unparsable)


_NOTHING = pl.DataFrame(schema={"row": pl.Int64, "user": pl.String, "item": pl.String, "time": pl.Float64})
_NO_REASON = broken_rows(pl.DataFrame(schema={ROW: pl.Int64}), "")


def read_interactions(
    path: Path,
    columns: InteractionColumns | None = None,
    minimum_rating: float | None = None,
    form: Form | None = None,
) -> tuple[pl.DataFrame, dict[str, int]]:
    """A log as ``user, item`` (text), ``time`` and, where it is named or filtered on, ``rating``, in file order.

    Dropped and counted: unparsable rows (no user or item, a time or rating that is none, a line with too many
    fields), then interactions below ``minimum_rating``, then up to one in a hundred with a time in another unit than
    the others, then duplicates: of one user and item the earliest stays, at equal times the first in the file.

    Raises:
        UserError: the file or a column is missing, the file is empty, times are in mixed units, or no row is left.
    """
    counts: Counter[str] = Counter()
    parts: list[pl.DataFrame] = []
    wanted: Literal["needed", "unused"] = "unused" if minimum_rating is None else "needed"
    for whole, broken in read_log(path, columns or InteractionColumns(), wanted, form):
        rated = rated_enough(whole, minimum_rating)
        counts += count_read(whole, broken, rated)
        parts.append(rated.drop("row"))
    check_some_left(path, counts, minimum_rating)
    rated = pl.concat(part for part in parts if part.height)
    log, more = clean_times(rated, choose_unit(path, count_units(rated["time"])))
    kept = drop_duplicates(log, "item")
    found = {name: counts[name] for name in (READ, UNPARSABLE, LOW)}
    return kept, found | more | {TWICE: log.height - kept.height}


def rated_enough(log: pl.DataFrame, minimum: float | None) -> pl.DataFrame:
    """The interactions that are rated ``minimum`` or more."""
    return log if minimum is None or "rating" not in log.columns else log.filter(pl.col("rating") >= minimum)


def count_read(whole: pl.DataFrame, broken: pl.DataFrame, rated: pl.DataFrame) -> Counter[str]:
    """Of a batch: how many rows there are, how many are broken, and how many are rated too low."""
    read = {READ: whole.height + broken.height, UNPARSABLE: broken.height, LOW: whole.height - rated.height}
    return Counter(read)


def check_some_left(path: Path, counts: Mapping[str, int], minimum_rating: float | None) -> None:
    """Refuse a log of which reading leaves nothing.

    Raises:
        UserError: no row is whole, or none is rated high enough.
    """
    read, parsed = counts.get(READ, 0), counts.get(READ, 0) - counts.get(UNPARSABLE, 0)
    if not read:
        raise UserError(f"{path}: {NO_ROWS}")
    if not parsed:
        raise UserError(f"{path}: all {read} rows are unparsable; check the names of the columns")
    if parsed == counts[LOW]:
        raise UserError(f"{path}: none of {parsed} interactions is rated {minimum_rating} or more; lower it")


def clean_times(log: pl.DataFrame, unit: str) -> tuple[pl.DataFrame, dict[str, int]]:
    """The interactions whose time is in ``unit``, with their times in seconds."""
    kept = log.filter(unit_of(pl.col("time")) == unit)
    return kept.with_columns(pl.col("time") / UNITS[unit]), {STRAY: log.height - kept.height}


def attach_titles(interactions: pl.DataFrame, items: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, int]]:
    """The log with the ``title`` of each item.

    Interactions with an item without title are dropped and counted. Two items of one title are one item to a
    model of titles: of a user's interactions with both, the earliest stays.
    """
    titled = interactions.join(items.select("item", "title"), on="item", how="left", maintain_order="left")
    known = titled.filter(pl.col("title").is_not_null())
    log = drop_duplicates(known, "title")
    return log, {
        UNTITLED: titled.height - known.height,
        "interactions with another item of the same title": known.height - log.height,
    }


def drop_duplicates(log: pl.DataFrame, item: str) -> pl.DataFrame:
    """The earliest row of each user and ``item`` (at equal times the first in the file), in file order."""
    ordered = log.with_row_index("\0place").sort("time", maintain_order=True)
    earliest = ordered.unique(subset=["user", item], keep="first", maintain_order=True)
    return earliest.sort("\0place").drop("\0place")
