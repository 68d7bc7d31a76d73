"""A long table as parts, each small enough for memory; the work on them one after another, or on many machines."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import polars as pl

Part = pl.DataFrame | Path  # a frame, or the Parquet file that it is in
Work = TypeVar("Work")
Spread = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]  # what `map` does, in the same order
GROUP = 100_000  # rows of a Parquet file that are read or passed over together


def load(part: Part) -> pl.DataFrame:
    """A part in memory."""
    return part if isinstance(part, pl.DataFrame) else pl.read_parquet(part, glob=False)


def scan(parts: Iterable[Part]) -> pl.LazyFrame:
    """All parts as one lazy table."""
    return pl.concat(
        part.lazy() if isinstance(part, pl.DataFrame) else pl.scan_parquet(part, glob=False) for part in parts
    )


def heights(parts: Iterable[Part]) -> list[int]:
    """The rows of each part."""
    return [int(scan([part]).select(pl.len()).collect().item()) for part in parts]


def save(frame: pl.DataFrame, path: Path) -> Path:
    """Write a frame as a part."""
    frame.write_parquet(path, row_group_size=GROUP, compression_level=1)
    return path


@dataclass(frozen=True)
class Workshop:
    """Where parts are worked on.

    Attributes:
        folder: of the files, which all machines see.
        spread: a function over many inputs, with the results in order; ``map`` does it here.
        spread_out: whether other machines work along, so that every part has to be a file.
    """

    folder: Path
    spread: Spread = map
    spread_out: bool = False

    def each(
        self, name: str, function: Callable[[Work], tuple[pl.DataFrame, Any]], inputs: Sequence[Work]
    ) -> tuple[list[Part], list[Any]]:
        """What ``function`` makes of each input: a part, and something more that is small.

        A single part stays in memory, unless other machines are to see it.
        """
        folder = self.folder / name if self.spread_out or len(inputs) > 1 else None
        if folder is not None:
            folder.mkdir()
        results = list(self.spread(partial(_made, function, folder), list(enumerate(inputs))))
        return [part for part, _ in results], [extra for _, extra in results]

    def drop(self, name: str) -> None:
        """Remove the files of an earlier ``name``."""
        shutil.rmtree(self.folder / name, ignore_errors=True)


def _made(
    function: Callable[[Any], tuple[pl.DataFrame, Any]], folder: Path | None, numbered: tuple[int, Any]
) -> tuple[Part, Any]:
    number, given = numbered
    frame, extra = function(given)
    return (frame if folder is None else save(frame, folder / f"{number:05d}.parquet")), extra


@dataclass(frozen=True)
class UserRange:
    """All rows of some users that follow one another, in runs that are sorted by user."""

    runs: tuple[Part, ...]
    first: str
    last: str

    def load(self) -> pl.DataFrame:
        """The rows in memory, sorted by user."""
        inside = scan(self.runs).filter(pl.col("user").is_between(pl.lit(self.first), pl.lit(self.last)))
        return inside.collect().sort("user", maintain_order=True)


def user_ranges(runs: Sequence[Part], users: pl.DataFrame, most: int) -> list[UserRange]:
    """Ranges of users that have about ``most`` rows together, or more where one user has.

    Args:
        runs: of rows, each sorted by ``user``.
        users: each ``user`` with the number of rows, ``len``.
        most: rows of a range.
    """
    ordered = users.group_by("user").agg(pl.col("len").sum()).sort("user")
    begins = pl.col("len").cum_sum() - pl.col("len")
    ranges = ordered.group_by((begins // most).alias("range"), maintain_order=True)
    bounds = ranges.agg(first=pl.col("user").first(), last=pl.col("user").last())
    return [UserRange(tuple(runs), first, last) for _, first, last in bounds.iter_rows()]


def batched(frames: Iterable[pl.DataFrame], most: int) -> Iterator[pl.DataFrame]:
    """The frames joined to larger ones, of ``most`` rows or a little more."""
    waiting: list[pl.DataFrame] = []
    height = 0
    for frame in frames:
        waiting.append(frame)
        height += frame.height
        if height >= most:
            yield pl.concat(waiting)
            waiting, height = [], 0
    if waiting:
        yield pl.concat(waiting)
