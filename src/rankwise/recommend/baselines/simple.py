"""What needs no model: chance, and what is most popular."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rankwise.recommend.metrics import Scores


def random_scores(candidates: Sequence[Sequence[str]]) -> list[Scores]:
    """One and the same score for every candidate.

    The metrics take the expectation over ties, so this gives the exact expectation of a random order: no
    seed, no noise.
    """
    return [np.zeros(len(titles)) for titles in candidates]


def popularity_scores(candidates: Sequence[Sequence[str]], popularity: Mapping[str, int]) -> list[Scores]:
    """How often each candidate occurs in the training part; 0 for one that never does."""
    return [_counts(titles, popularity) for titles in candidates]


def _counts(titles: Sequence[str], popularity: Mapping[str, int]) -> Scores:
    return np.array([popularity.get(title, 0) for title in titles], dtype=np.float64)


def target_places(candidates: Sequence[Sequence[str]], targets: Sequence[str]) -> list[int]:
    """The place of the target in each list of candidates."""
    return [list(titles).index(target) for titles, target in zip(candidates, targets, strict=True)]
