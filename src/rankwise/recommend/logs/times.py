"""Times of a log, whatever they are written as, in seconds since 1970."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import polars as pl

from rankwise.errors import UserError

UNITS = {"seconds": 1.0, "milliseconds": 1e3, "microseconds": 1e6, "nanoseconds": 1e9}  # in a second
_BOUNDS = (1e11, 1e14, 1e17)  # the year 5138 in seconds, and so on: what is larger is of the next unit
_STRAY = 0.01  # a share of times in another unit up to which they count as broken rows


def number(column: pl.Expr) -> pl.Expr:
    """Finite numbers out of text, null for anything else."""
    found = column.str.strip_chars().cast(pl.Float64, strict=False)
    return pl.when(found.is_finite()).then(found)


def parse_times(texts: pl.Series, form: str | None = None) -> pl.Series:
    """Numbers as they are, ISO 8601 text as seconds since 1970 (UTC where no zone is told), null for anything else.

    Args:
        texts: the times.
        form: of other dates, such as ``%a %b %d %H:%M:%S %z %Y``.
    """
    numbers = texts.to_frame("text").select(number(pl.col("text")))["text"]
    if numbers.null_count() == texts.null_count():
        return numbers
    dates = texts.set(numbers.is_not_null(), None)
    if form is not None:
        moments = dates.str.to_datetime(form, time_unit="us", strict=False)
    else:  # first those that are quick to read
        moments = dates.str.to_datetime("%Y-%m-%dT%H:%M:%S%.f", time_unit="us", strict=False)
    seconds = moments.dt.timestamp("us").cast(pl.Float64) / 1e6
    left = dates.set(seconds.is_not_null(), None)
    if form is None and left.null_count() < len(left):
        seconds = seconds.fill_null(left.map_elements(iso_seconds, return_dtype=pl.Float64))
    return numbers.fill_null(seconds)


def iso_seconds(text: str) -> float | None:
    """Seconds since 1970 of an ISO 8601 date or time (UTC where no zone is told), ``None`` for anything else."""
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        return None
    seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    return seconds if math.isfinite(seconds) else None


def unit_of(time: pl.Expr) -> pl.Expr:
    """The unit that a number of today would have: numbers that are too small for any of them count as seconds."""
    size = time.abs()
    name = pl.lit("nanoseconds")
    for bound, unit in reversed(list(zip(_BOUNDS, UNITS, strict=False))):
        name = pl.when(size < bound).then(pl.lit(unit)).otherwise(name)
    return name


def count_units(times: pl.Series) -> dict[str, int]:
    """How many of the times seem to be in each unit."""
    counted = times.to_frame("time").group_by(unit_of(pl.col("time")).alias("unit")).len()
    return dict(counted.iter_rows())


def choose_unit(path: Path, counts: Mapping[str, int]) -> str:
    """The unit of nearly all times of a log.

    Raises:
        UserError: more than one time in a hundred is in another unit.
    """
    unit = max(counts, key=lambda name: counts[name])
    total = sum(counts.values())
    if total - counts[unit] > _STRAY * total:
        found = ", ".join(f"{counts[name]} in {name}" for name in UNITS if counts.get(name))
        raise UserError(f"{path}: times in mixed units ({found}, by their size): write all of them in one")
    return unit
