"""Candidates for a case, drawn by seed: the target among titles that the user never met."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

from rankwise.errors import UserError
from rankwise.recommend.splits import Case


def draw_candidates(case: Case, catalogue: Sequence[str], count: int, seed: int) -> tuple[str, ...]:
    """The target and ``count - 1`` other titles of the catalogue in a shuffled order.

    No title of ``case.seen`` is drawn: for validation and test the user's whole history, later items included, so that
    no candidate but the target is one that the user chose; for training the training part of it. The draw depends on
    the seed, the user, the target and the catalogue (give it sorted) only: other users, and how many cases there are,
    change nothing.

    Raises:
        UserError: the catalogue has too few titles that the user has not met.
    """
    excluded = case.seen | {case.target}
    generator = random.Random(f"{seed}:candidates:{case.user}:{case.target}")
    drawn = _draw(generator, catalogue, excluded, count - 1)
    if drawn is None:
        raise UserError(
            f"the catalogue of {len(catalogue)} titles is too small: user {case.user!r} has met"
            f" {len(excluded)} of them, and {count - 1} others are needed; ask for fewer candidates"
        )
    candidates = [case.target, *drawn]
    generator.shuffle(candidates)
    return tuple(candidates)


def _draw(generator: random.Random, catalogue: Sequence[str], excluded: frozenset[str], count: int) -> list[str] | None:
    """``count`` distinct titles outside ``excluded``, or ``None`` where there are not as many."""
    size = len(catalogue)
    if size - len(excluded) < 3 * count:
        free = [title for title in catalogue if title not in excluded]
        return generator.sample(free, count) if len(free) >= count else None
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        title = catalogue[int(generator.random() * size)]
        if title not in excluded:
            drawn[title] = None
    return list(drawn)


def with_candidates(case: Case, catalogue: Sequence[str], count: int, seed: int) -> Case:
    """The case with candidates drawn for it; one that has some keeps them (published data)."""
    if case.candidates:
        return case
    return replace(case, candidates=draw_candidates(case, catalogue, count, seed))


def draw_negatives(case: Case, count: int, seed: int) -> tuple[str, ...]:
    """Draw ``count`` wrong answers from the case's own candidates, as the S-DPO authors do.

    The draw depends on the seed, the user and the target only.

    Raises:
        UserError: the case has too few candidates.
    """
    wrong = [title for title in case.candidates if title != case.target]
    if not 1 <= count <= len(wrong):
        raise UserError(
            f"negatives = {count}: between 1 and {len(wrong)}, drawn from {len(case.candidates)} candidates"
        )
    generator = random.Random(f"{seed}:negatives:{case.user}:{case.target}")
    return tuple(generator.sample(wrong, count))


def cannot_be_won(candidates: Iterable[str], target: str) -> bool:
    """Whether a candidate other than the target is inside the target's title, whatever the letters' case.

    The papers' protocol finds two candidates in the right answer there, and calls it invalid.
    """
    right = target.lower()
    return any(title != target and title.lower() in right for title in candidates)
