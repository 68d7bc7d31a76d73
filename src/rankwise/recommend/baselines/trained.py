"""The baselines by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
from jaxtyping import Float

from rankwise.errors import UserError
from rankwise.recommend.baselines.counting import ItemNeighbours, MatrixFactorisation, Popularity
from rankwise.recommend.baselines.networks import Caser, GRU4Rec, SASRec
from rankwise.recommend.baselines.sequential import Sequential
from rankwise.recommend.baselines.windows import Titles, Window


class Baseline(Protocol):
    """A recommender that is no language model."""

    def fit(self, train: Sequence[Window], validation: Sequence[Window]) -> Baseline:
        """Learn from windows; those of validation only say when to stop."""
        ...

    def scores(self, histories: Sequence[Sequence[str]]) -> Float[np.ndarray, "histories titles"]:
        """A score of each title of the catalogue after each history; higher is better."""
        ...


BASELINES: dict[str, Callable[[Titles, int], Baseline]] = {
    "popularity": Popularity,
    "item-knn": ItemNeighbours,
    "als": MatrixFactorisation,
    "gru4rec": partial(Sequential, GRU4Rec),
    "caser": partial(Sequential, Caser),
    "sasrec": partial(Sequential, SASRec),
}


def check_baselines(names: Iterable[str]) -> None:
    """Refuse names that are none's.

    Raises:
        UserError: one is unknown.
    """
    for name in names:
        if name not in BASELINES:
            raise UserError(f"{name!r} is no baseline: choose from {', '.join(BASELINES)}")


def make_baseline(name: str, titles: Sequence[str], seed: int = 0) -> FallingBack:
    """A baseline by its name, for a catalogue; a history without a known title gets what is popular.

    Args:
        name: one of ``BASELINES``.
        titles: the catalogue, each title once.
        seed: of what is drawn.

    Raises:
        UserError: the name is unknown, or there is no title.

    Example:
        >>> windows = [Window("u1", ["Alien"], "Aliens"), Window("u2", ["Heat"], "Casino")]
        >>> popular = make_baseline("popularity", ["Alien", "Aliens", "Casino", "Heat"]).fit(windows, windows)
        >>> popular.scores([["Alien"]]).shape
        (1, 4)
    """
    check_baselines([name])
    if not titles:
        raise UserError("the catalogue is empty: a baseline needs at least one title")
    return FallingBack(BASELINES[name], Titles(titles), seed)


class FallingBack:
    """A baseline, and popularity where it has nothing to go by."""

    def __init__(self, make: Callable[[Titles, int], Baseline], titles: Titles, seed: int) -> None:
        self.titles, self.popularity = titles, Popularity(titles)
        self.baseline = make(titles, seed)
        self.without_known_titles = 0

    def fit(self, train: Sequence[Window], validation: Sequence[Window]) -> FallingBack:
        """Learn from windows; those whose next title is not in the catalogue are left out."""
        parts = ([one for one in part if one.target in self.titles.places] for part in (train, validation))
        known = tuple(parts)
        self.popularity.fit(known[0])
        self.baseline.fit(*known)
        return self

    def scores(self, histories: Sequence[Sequence[str]]) -> Float[np.ndarray, "histories titles"]:
        """A score of each title of the catalogue after each history; higher is better.

        Raises:
            UserError: a score is no finite number.
        """
        found = self.baseline.scores(histories)
        unknown = [row for row, history in enumerate(histories) if not self.titles.known(history)]
        found[unknown] = self.popularity.counts
        self.without_known_titles += len(unknown)
        if not np.isfinite(found).all():
            raise UserError("a baseline's score is no finite number: its training has broken down")
        return found
