"""The baselines that are trained, by name."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
from jaxtyping import Float

from rankwise.errors import UserError
from rankwise.recommend.baselines.counting import ItemNeighbours, MatrixFactorisation
from rankwise.recommend.baselines.networks import Caser, GRU4Rec, SASRec
from rankwise.recommend.baselines.sequential import Sequential
from rankwise.recommend.baselines.windows import Titles, Window, by_user


class Baseline(Protocol):
    """A recommender that is no language model."""

    def fit(self, train: Sequence[Window], validation: Sequence[Window]) -> Baseline:
        """Learn from windows; those of validation only say when to stop."""
        ...

    def scores(self, histories: Sequence[Sequence[str]]) -> Float[np.ndarray, "histories titles"]:
        """A score of each title of the catalogue after each history; higher is better."""
        ...


BASELINES: dict[str, Callable[[Titles, int], Baseline]] = {
    "item-knn": ItemNeighbours,
    "als": MatrixFactorisation,
    "gru4rec": partial(Sequential, GRU4Rec),
    "caser": partial(Sequential, Caser),
    "sasrec": partial(Sequential, SASRec),
}
BY_LIBRARY = ("item-knn", "als")  # computed by `implicit`, of the extra ``recsys``


def check_baselines(names: Iterable[str]) -> None:
    """Refuse what cannot be made, before any of it is trained.

    Raises:
        UserError: a name is unknown, or needs a library that is not installed.
    """
    for name in names:
        if name not in BASELINES:
            raise UserError(f"{name!r} is no baseline: choose from {', '.join(BASELINES)}")
        if name in BY_LIBRARY and importlib.util.find_spec("implicit") is None:
            raise UserError(f"the baseline {name} needs `implicit`: install rankwise with its extra, rankwise[recsys]")


class TrainedBaseline:
    """A baseline by its name, for a catalogue; a history without a known title gets what is popular.

    Args:
        name: one of ``BASELINES``.
        titles: the catalogue, each title once.
        seed: of what is drawn.

    Attributes:
        counts: windows that were left out, since their next title is not in the catalogue, and histories that got
            what is popular, so far.

    Raises:
        UserError: the name is unknown, its library is not installed, or there is no title.

    Example:
        >>> windows = [Window("u1", ["Alien"], "Aliens"), Window("u2", ["Heat"], "Casino")]
        >>> baseline = TrainedBaseline("sasrec", ["Alien", "Aliens", "Casino", "Heat"]).fit(windows, windows)
        >>> baseline.scores([["Alien"]]).shape
        (1, 4)
    """

    def __init__(self, name: str, titles: Sequence[str], seed: int = 0) -> None:
        check_baselines([name])
        if not titles:
            raise UserError("the catalogue is empty: a baseline needs at least one title")
        self._titles = Titles(titles)
        self._baseline = BASELINES[name](self._titles, seed)
        self.counts = Counter({"windows left out": 0, "histories without a known title": 0})

    def fit(self, train: Sequence[Window], validation: Sequence[Window]) -> TrainedBaseline:
        """Learn from windows; those of validation only say when to stop."""
        known = [[one for one in part if one.target in self._titles.places] for part in (train, validation)]
        self.counts["windows left out"] = len(train) + len(validation) - sum(map(len, known))
        self._baseline.fit(*known)
        self._popularity = self._titles.matrix(by_user(known[0])).sum(axis=0)
        return self

    def scores(self, histories: Sequence[Sequence[str]]) -> Float[np.ndarray, "histories titles"]:
        """A score of each title of the catalogue after each history; higher is better.

        Raises:
            UserError: a score is no finite number.
        """
        found = self._baseline.scores(histories)
        unknown = [row for row, history in enumerate(histories) if not self._titles.known(history)]
        found[unknown] = self._popularity
        self.counts["histories without a known title"] += len(unknown)
        if not np.isfinite(found).all():
            raise UserError("a baseline's score is no finite number: its training has broken down")
        return found
