"""How a run of `preference_study.py` did on its cases, and whether the difference from another run says anything."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rankwise.recommend import ranking_metrics
from rankwise.recommend.metrics import possible_ranks

Scores = list[np.ndarray]  # of each case, a number for each candidate; the true one is the first


def metrics(scores: Scores) -> dict[str, float]:
    """Means over cases: ranking, and in nats ``chosen``, ``margin`` and ``log-loss``.

    ``chosen`` is the log-probability of the true answer, ``margin`` how far it is above the mean of the others, and
    ``log-loss`` its cross-entropy where the candidates are all there is: log 20 where they are alike, less is better.
    It says more than HR@1 with the same cases.
    """
    found = ranking_metrics(scores, [0] * len(scores))
    return {**found, **{name: float(np.mean(values)) for name, values in by_case(scores).items()}}


def by_case(scores: Scores) -> dict[str, np.ndarray]:
    """``chosen``, ``margin`` and ``log-loss`` of each case."""
    chosen = np.array([values[0] for values in scores])
    others = np.array([values[1:].mean() for values in scores])
    total = np.array([np.logaddexp.reduce(values.astype(float)) for values in scores])
    return {"chosen": chosen, "margin": chosen - others, "log-loss": total - chosen}


def ranks(scores: Scores) -> list[int]:
    """The rank of the true answer in each case, the worst one where scores tie."""
    return [possible_ranks(values, 0)[-1] for values in scores]


def differences(scores: Scores, others: Scores) -> dict[str, tuple[float, float]]:
    """Of each measure the mean difference on the same cases, and its standard error."""
    found = rank_differences(ranks(scores), ranks(others))
    before, after = by_case(others), by_case(scores)
    return found | {name: _paired(after[name] - before[name]) for name in after}


def rank_differences(ranks: Sequence[int], others: Sequence[int]) -> dict[str, tuple[float, float]]:
    """The same of what follows from ranks; for HR@1 the standard error is McNemar's without the null hypothesis."""
    one, two = (np.array(values, dtype=float) for values in (ranks, others))
    pairs = {"HR@1": (one == 1, two == 1), "NDCG@5": (_gains(one), _gains(two)), "MRR": (1 / one, 1 / two)}
    return {name: _paired(after.astype(float) - before.astype(float)) for name, (after, before) in pairs.items()}


def _gains(ranks: np.ndarray) -> np.ndarray:
    return np.where(ranks <= 5, 1 / np.log2(ranks + 1), 0.0)


def _paired(values: np.ndarray) -> tuple[float, float]:
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return round(float(values.mean()), 5), round(float(error), 5)
