"""Chronological leave-last-out: a user's last item for test, the last but one for validation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import polars as pl

from rankwise.errors import UserError


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


@dataclass(frozen=True)
class Split:
    """Cases of the three parts, the catalogue, and how often each title occurs in the training part."""

    train: list[Case]
    validation: list[Case]
    test: list[Case]
    catalogue: list[str]  # sorted titles of the whole log: an item whose only interaction is a test target is in it
    popularity: dict[str, int]  # training interactions only, those without history included
    counts: dict[str, int]


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
    if history < 1 or minimum_history < 1:
        raise UserError(f"history = {history} and minimum_history = {minimum_history}: both must be at least 1")
    if minimum_interactions < 3:
        raise UserError(f"minimum_interactions = {minimum_interactions}: at least 3 (train, validation and test)")
    split = Split([], [], [], sorted(log["title"].unique().to_list()), {}, {})
    popularity: Counter[str] = Counter()
    short = short_interactions = 0
    for user, titles in _by_user(log):
        if len(titles) < minimum_interactions:
            short, short_interactions = short + 1, short_interactions + len(titles)
            continue
        *cases, validation, test = _windows(user, titles, history, minimum_history)
        split.train.extend(cases)
        split.validation.append(validation)
        split.test.append(test)
        popularity.update(titles[:-2])
    if not split.test:
        raise UserError(f"none of {short} users has {minimum_interactions} interactions or more: nothing to train on")
    split.popularity.update(popularity)
    split.counts.update(
        {
            "users": len(split.test),
            "users with too short a history": short,
            "interactions of users with too short a history": short_interactions,
        }
    )
    return split


def _by_user(log: pl.DataFrame) -> Iterator[tuple[str, list[str]]]:
    ordered = log.sort("user", "time", maintain_order=True)
    pairs = zip(ordered["user"].to_list(), ordered["title"].to_list(), strict=True)
    for user, group in groupby(pairs, key=lambda pair: pair[0]):
        yield user, [title for _, title in group]


def _windows(user: str, titles: list[str], history: int, minimum_history: int) -> list[Case]:
    """The cases of one user, oldest first; the last two are validation and test, however short.

    A training case knows nothing of those two: were they never drawn as its wrong candidates, a model could learn from
    what is missing which items the user will choose.
    """
    first, last = min(minimum_history, len(titles) - 2), len(titles) - 2
    seen, known = frozenset(titles), frozenset(titles[:-2])
    return [
        Case(user, tuple(titles[max(0, end - history) : end]), titles[end], seen=known if end < last else seen)
        for end in range(first, len(titles))
    ]
