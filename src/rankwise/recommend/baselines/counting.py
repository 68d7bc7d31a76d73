"""Baselines that count who chose what, whatever the order: item neighbours and matrix factorisation, by `implicit`."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from threadpoolctl import threadpool_limits

from rankwise.recommend.baselines.windows import Titles, Window, by_user

Scores = Float[np.ndarray, "histories titles"]


class ItemNeighbours:
    """Titles whose users are those of the history's titles: the sum of their cosines with each of these.

    score(h, j) = sum over i in h of |U_i and U_j| / sqrt(|U_i| |U_j|), U_i the users who chose i; of each title the
    ``neighbours`` nearest ones count.

    Source: Sarwar et al., Item-based collaborative filtering recommendation algorithms (2001).
    """

    neighbours = 100

    def __init__(self, titles: Titles, seed: int = 0) -> None:
        """For a catalogue; nothing is drawn."""
        self.titles = titles

    def fit(self, train: Sequence[Window], validation: Sequence[Window] = ()) -> ItemNeighbours:
        """Count who chose which titles together."""
        found = _implicit("nearest_neighbours").CosineRecommender(K=self.neighbours, num_threads=1)
        with warnings.catch_warnings():  # of a conversion within the library
            warnings.simplefilter("ignore")
            found.fit(self.titles.matrix(by_user(train)), show_progress=False)
        self.similarity = found.similarity.tocsr()
        self.similarity.setdiag(0)  # a title says nothing about itself
        return self

    def scores(self, histories: Sequence[Sequence[str]]) -> Scores:
        """Of each history and title, higher is better."""
        found: Scores = (self.titles.matrix(histories) @ self.similarity).toarray().astype(np.float64)
        return found


class MatrixFactorisation:
    """Factors of users and titles by alternating least squares over all pairs, the chosen ones weighted more.

    They minimise sum over u, j of c_uj (p_uj - x_u . y_j)^2 + regularisation (|x|^2 + |y|^2), with p 1 and c = alpha
    where u chose j, and p 0 and c 1 elsewhere. A history's factors are those that fit it best.

    Source: Hu, Koren and Volinsky, Collaborative filtering for implicit feedback datasets (2008).
    """

    factors, regularisation, alpha, iterations = 64, 0.01, 10.0, 15

    def __init__(self, titles: Titles, seed: int = 0) -> None:
        """For a catalogue; the seed is of the first factors."""
        self.titles, self.seed = titles, seed

    def fit(self, train: Sequence[Window], validation: Sequence[Window] = ()) -> MatrixFactorisation:
        """Alternate."""
        with threadpool_limits(1, "blas"):  # the library has threads of its own, and warns of these
            self.model = _implicit("als").AlternatingLeastSquares(
                factors=self.factors,
                regularization=self.regularisation,
                alpha=self.alpha,
                iterations=self.iterations,
                num_threads=1,
                random_state=self.seed,
            )
            self.model.fit(self.titles.matrix(by_user(train)), show_progress=False)
        return self

    def scores(self, histories: Sequence[Sequence[str]]) -> Scores:
        """Of each history and title, higher is better."""
        with threadpool_limits(1, "blas"):
            users = self.model.recalculate_user(np.arange(len(histories)), self.titles.matrix(histories))
        found: Scores = (users @ self.model.item_factors.T).astype(np.float64)
        return found


def _implicit(module: str) -> Any:
    return importlib.import_module(f"implicit.{module}")
