"""Which interactions train, and which are held out: by place, by time, by user, or as the log itself tells."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

import polars as pl

from rankwise.errors import UserError, nearest
from rankwise.recommend.logs.times import iso_seconds

PARTS = ("train", "validation", "test")
_OTHER_NAMES = {"training": "train", "valid": "validation", "val": "validation", "dev": "validation", "testing": "test"}


@dataclass(frozen=True)
class Case:
    """One question: after this history, which item came next?

    Items are titles. ``candidates`` is empty until they are drawn; ``seen`` is what may not be drawn as a
    wrong answer.
    """

    user: str
    history: tuple[str, ...]  # oldest first
    target: str
    candidates: tuple[str, ...] = ()
    seen: frozenset[str] = frozenset()
    ratings: tuple[float | None, ...] = ()  # of the history's items, where the log has them


@dataclass(frozen=True, kw_only=True)
class SplitSettings:
    """How a log is split.

    ``last``: each user's last item for test, the last but one for validation. ``time``: everybody's interactions from
    ``validation_from`` on for validation, from ``test_from`` on for test, so that nothing is learnt from what came
    later. ``users``: a share of the users for each, and of these the last item. ``given``: as the log's column of the
    part says.
    """

    kind: Literal["last", "time", "users", "given"] = "last"
    validation_from: int | float | str | None = None  # seconds since 1970 or a date
    test_from: int | float | str | None = None
    holdout: float = 0.1  # share of the interactions (time, where no dates are told) or users, for each of the two
    minimum_interactions: int = 3  # users with fewer are left out
    minimum_history: int = 1  # items before a training target, at least
    history: int = 10  # items in a prompt, at most
    seed: int = 0


def check_split(settings: SplitSettings) -> None:
    """Refuse what can be refused before any file is read.

    Raises:
        UserError: a setting is out of range, or one is missing.
    """
    history, least = settings.history, settings.minimum_history
    if history < 1 or least < 1:
        raise UserError(f"history = {history} and minimum_history = {least}: both must be at least 1")
    fewest = 3 if settings.kind == "last" else 2
    if settings.minimum_interactions < fewest:
        why = "(train, validation and test)" if fewest == 3 else "(a history and a target)"
        raise UserError(f"minimum_interactions = {settings.minimum_interactions}: at least {fewest} {why}")
    if not 0 < settings.holdout < 0.5:
        raise UserError(f"holdout = {settings.holdout}: between 0 and 0.5, since it is held out twice")
    cuts = settings.validation_from, settings.test_from
    if (cuts[0] is None) != (cuts[1] is None):
        raise UserError("a split by time needs validation_from and test_from, or neither for shares of the log")
    if cuts[0] is not None and cuts[1] is not None and moment(cuts[0]) >= moment(cuts[1]):
        raise UserError(f"validation_from = {cuts[0]} is not before test_from = {cuts[1]}")


def moment(value: int | float | str) -> float:
    """Seconds since 1970 of a number or an ISO 8601 date.

    Raises:
        UserError: it is neither.
    """
    try:
        seconds: float | None = float(value)
    except ValueError:
        seconds = iso_seconds(str(value))
    if seconds is None or not math.isfinite(seconds):
        raise UserError(f"{value!r} is no time: give seconds since 1970 or a date such as 2020-01-31")
    return seconds


def time_cuts(times: pl.LazyFrame, settings: SplitSettings) -> tuple[float, float]:
    """When validation and test begin: as told, or so that each has its share of the interactions.

    Raises:
        UserError: the shares cannot be cut, since too many interactions have one time.
    """
    if settings.validation_from is not None and settings.test_from is not None:
        return moment(settings.validation_from), moment(settings.test_from)
    at = [1 - 2 * settings.holdout, 1 - settings.holdout]
    quantiles = times.select(
        *(pl.col("time").quantile(share, "higher").alias(str(place)) for place, share in enumerate(at)),
        first=pl.col("time").min(),
    )
    validation, test, first = quantiles.collect(engine="streaming").row(0)
    if not first < validation < test:
        raise UserError(
            f"a share of {settings.holdout} cannot be cut by time: too many interactions have the same; "
            "name validation_from and test_from, or choose another split"
        )
    return validation, test


def with_parts(log: pl.DataFrame, settings: SplitSettings, cuts: tuple[float, float] | None = None) -> pl.DataFrame:
    """The log with the ``part`` of each interaction (null for none), and whether it is a ``case``: a target.

    Args:
        log: of whole users, in the order of users and time, with ``user``, ``title``, ``time``, and ``part`` where it
            is given.
        settings: how to split.
        cuts: where validation and test begin in a split by time.

    Raises:
        UserError: the part that the log gives is none.
    """
    place = pl.int_range(pl.len(), dtype=pl.Int64).over("user")
    placed = log.with_columns(position=place, size=pl.len().over("user").cast(pl.Int64))
    parted = placed.with_columns(part=_parts(placed, settings, cuts))
    trains = pl.col("part") == "train"
    before = pl.when(trains).then(trains.fill_null(False).cum_sum().over("user") - 1).otherwise(pl.col("position"))
    least = pl.when(trains).then(settings.minimum_history).otherwise(1)
    return parted.with_columns(case=pl.col("part").is_not_null() & (before >= least))


def _parts(log: pl.DataFrame, settings: SplitSettings, cuts: tuple[float, float] | None) -> pl.Expr | pl.Series:
    left = pl.col("size") - pl.col("position")
    test, validation, train = pl.lit("test"), pl.lit("validation"), pl.lit("train")
    if settings.kind == "last":
        return pl.when(left == 1).then(test).when(left == 2).then(validation).otherwise(train)
    if settings.kind == "time":
        assert cuts is not None
        later, latest = pl.col("time") >= cuts[0], pl.col("time") >= cuts[1]
        return pl.when(latest).then(test).when(later).then(validation).otherwise(train)
    if settings.kind == "users":
        who = person(log.columns)
        users = log[who].unique(maintain_order=True)
        drawn = pl.Series([_draw_part(user, settings) for user in users], dtype=pl.String)
        part = pl.col(who).replace_strict(users, drawn, return_dtype=pl.String)
        return pl.when((part == "train") | (left == 1)).then(part)
    return _given_parts(log)


def person(columns: Sequence[str]) -> str:
    """The column that tells who it is: a ``user`` may be one of a person's sessions."""
    return "person" if "person" in columns else "user"


def _draw_part(user: str, settings: SplitSettings) -> str:
    """The part of a user, whoever else there is."""
    drawn = random.Random(f"{settings.seed}:part:{user}").random()
    return "test" if drawn < settings.holdout else "validation" if drawn < 2 * settings.holdout else "train"


def _given_parts(log: pl.DataFrame) -> pl.Series:
    named = log["part"].str.to_lowercase().replace(_OTHER_NAMES)  # no row is without: reading sees to it
    unknown = log["part"].filter(~named.is_in(PARTS))
    if unknown.len():
        raise UserError(f"{unknown[0]!r} is no part of a split; {nearest(str(unknown[0]), PARTS)}")
    return named


def cases_of(log: pl.DataFrame, part: str, history: int, picks: Sequence[int] | None = None) -> Iterator[Case]:
    """The cases of a part, by user and time.

    A training case knows of training interactions alone, in its history too: were those held out never drawn as its
    wrong candidates, a model could learn from what is missing which items the user will choose.

    Args:
        log: that :func:`with_parts` made.
        part: ``train``, ``validation`` or ``test``.
        history: the most items before a target, the latest ones.
        picks: which of the cases, by place and in order; all of them by default.
    """
    if part == "train":
        place = pl.int_range(pl.len(), dtype=pl.Int64).over("user")
        log = log.filter(pl.col("part") == part).with_columns(position=place, size=pl.len().over("user").cast(pl.Int64))
    targets = log.with_row_index("row").filter(pl.col("case") & (pl.col("part") == part))
    targets = targets.select(pl.col("row").cast(pl.Int64), "user", "position", "size")
    if picks is not None:
        targets = targets[picks.start : picks.stop] if isinstance(picks, range) else targets[list(picks)]
    rated = log["rating"] if "rating" in log.columns else None
    for user, rows in groupby(targets.iter_rows(), key=lambda row: row[1]):
        first, seen, titles = -1, frozenset[str](), list[str]()
        for row, _, position, size in rows:
            if first < 0:
                first = row - position
                titles = log["title"].slice(first, size).to_list()
                seen = frozenset(titles)
            shown = slice(max(0, position - history), position)
            ratings = () if rated is None else tuple(rated.slice(first, size)[shown].to_list())
            yield Case(user, tuple(titles[shown]), titles[position], seen=seen, ratings=ratings)


@dataclass(frozen=True)
class Split:
    """Cases of the three parts, the catalogue, and how often each title occurs in the training part."""

    train: list[Case]
    validation: list[Case]
    test: list[Case]
    catalogue: list[str]  # sorted titles of the whole log: an item whose only interaction is a test target is in it
    popularity: dict[str, int]  # training interactions only, those without history included
    counts: dict[str, int] = field(default_factory=dict)


def leave_last_out(
    log: pl.DataFrame, history: int = 10, minimum_interactions: int = 3, minimum_history: int = 1
) -> Split:
    """Split a log of ``user, title, time`` by user; interactions at equal times keep the order of the file.

    Args:
        log: one row an interaction, no (user, title) twice.
        history: the most items before a target, the latest ones.
        minimum_interactions: users with fewer are dropped and counted; at least 3.
        minimum_history: a training position with fewer items before it is no case; at least 1.

    Raises:
        UserError: a setting is out of range, or every user's history is too short.
    """
    settings = SplitSettings(
        minimum_interactions=minimum_interactions, minimum_history=minimum_history, history=history
    )
    check_split(settings)
    kept, counts = long_enough(log.sort("user", "time", maintain_order=True), minimum_interactions)
    check_users(counts, minimum_interactions)
    parted = with_parts(kept, settings)
    train, validation, test = (list(cases_of(parted, part, history)) for part in PARTS)
    popularity = Counter(parted.filter(pl.col("part") == "train")["title"].to_list())
    return Split(train, validation, test, sorted(log["title"].unique().to_list()), dict(popularity), counts)


USERS, SHORT = "users", "users with too short a history"


def long_enough(log: pl.DataFrame, minimum: int) -> tuple[pl.DataFrame, dict[str, int]]:
    """The interactions of users that have at least as many, and the counts of both."""
    size = pl.len().over("user")
    kept = log.filter(size >= minimum)
    users = kept["user"].n_unique()
    return kept, {
        USERS: users,
        SHORT: log["user"].n_unique() - users,
        "interactions of users with too short a history": log.height - kept.height,
    }


def check_users(counts: dict[str, int], minimum: int) -> None:
    """Refuse a log in which nobody is left.

    Raises:
        UserError: every user's history is too short.
    """
    if not counts[USERS]:
        raise UserError(f"none of {counts[SHORT]} users has {minimum} interactions or more: nothing to train on")
