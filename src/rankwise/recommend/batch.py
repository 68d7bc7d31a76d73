"""Recommendations for many users, as a folder of Parquet files that a run which was cut off goes on with."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from rankwise.errors import UserError
from rankwise.files import write_bytes, write_json
from rankwise.reading import read_json
from rankwise.recommend.recommender import Recommender

PART = 1000  # users of a file
TOGETHER = 64  # users whose prompts are read together
SETTINGS = "settings.json"
SCHEMA: dict[str, Any] = {
    "user": pl.String,
    "rank": pl.Int64,
    "title": pl.String,
    "items": pl.List(pl.String),
    "score": pl.Float64,
    "exact": pl.Boolean,
}


class Part(NamedTuple):
    """Some users, and the file that their recommendations go to."""

    path: Path
    users: list[str]


def recommend_users(
    recommender: Recommender, users: Sequence[str], folder: Path, settings: dict[str, Any], **options: Any
) -> Iterator[int]:
    """Write the best titles of each user into ``folder/part-00000.parquet`` and so on, a thousand users in each.

    A part is there whole or not at all; parts that are there already are not made again. Columns: ``user``, ``rank``
    from 1, ``title``, the ids of its ``items``, ``score``, and whether the ranking is ``exact``.

    Args:
        recommender: what recommends.
        users: of the log; each needs a history there.
        folder: new, empty, or with parts of the same users and settings.
        settings: what the recommendations depend on, kept in ``settings.json`` to tell whether old parts fit.
        **options: of :meth:`Recommender.recommend`.

    Yields:
        How many users are done, after each few.

    Raises:
        UserError: a user is unknown, or the folder holds something else.
    """
    done = 0
    for part in open_parts(recommender, users, folder, {**settings, **options}):
        for some in write_part(recommender, part, **options):
            yield done + some
        done += len(part.users)


def open_parts(recommender: Recommender, users: Sequence[str], folder: Path, settings: dict[str, Any]) -> list[Part]:
    """The parts that :func:`recommend_users` writes; some may be there already."""
    for user in users:
        recommender.store.history(user)  # which an unknown one has not
    _open(folder, {**settings, "users": list(users)})
    starts = range(0, len(users), PART)
    return [
        Part(folder / f"part-{at:05d}.parquet", list(users[start : start + PART])) for at, start in enumerate(starts)
    ]


def write_part(recommender: Recommender, part: Part, **options: Any) -> Iterator[int]:
    """Write one part, unless it is there; yield how many of its users are done, after each few."""
    if not part.path.exists():
        rows: list[tuple[Any, ...]] = []
        for start in range(0, len(part.users), TOGETHER):
            some = part.users[start : start + TOGETHER]
            rows += _rows(recommender, some, options)
            yield min(start + TOGETHER, len(part.users))
        buffer = io.BytesIO()
        pl.DataFrame(rows, schema=SCHEMA, orient="row").write_parquet(buffer)
        write_bytes(part.path, buffer.getvalue())
    yield len(part.users)


def _open(folder: Path, settings: dict[str, Any]) -> None:
    """A new folder gets the settings; one that is there must have the same."""
    path = folder / SETTINGS
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not path.is_file():
            raise UserError(f"{folder} is there, and holds no recommendations: choose another folder")
        if read_json(path, dict, "choose another folder") != settings:
            raise UserError(f"{folder} holds recommendations of other users or settings: choose another folder")
    write_json(path, settings)


def _rows(recommender: Recommender, users: Sequence[str], options: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    store = recommender.store
    histories, ratings = [store.history(user) for user in users], [store.ratings(user) for user in users]
    rankings = recommender.recommend(histories, ratings=ratings, **options)
    for user, ranking in zip(users, rankings, strict=True):
        for rank, one in enumerate(ranking.best, start=1):
            yield user, rank, one.title, one.items, one.score, ranking.exact
