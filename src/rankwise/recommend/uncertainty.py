"""How far a mean over cases can be trusted, and whether two models differ on the same cases."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped
from scipy import stats

from rankwise.errors import UserError

RESAMPLES, AT_A_TIME = 2000, 2**24  # numbers in memory at once
Values = Float[np.ndarray, " cases"]


class Interval(NamedTuple):
    """A mean over cases with its bootstrap interval."""

    mean: float
    low: float
    high: float


class Comparison(NamedTuple):
    """The mean difference of two models on the same cases, its bootstrap interval, and a two-sided p-value."""

    difference: float
    low: float
    high: float
    p: float


def mean_interval(values: Values, level: float = 0.95, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Mean of a metric over cases, with the percentile bootstrap's interval: cases are drawn with replacement.

    Args:
        values: of each case, such as its reciprocal rank; at least 1.
        level: share of the resampled means within the interval, between 0 and 1.
        seed: of the draws.
        resamples: how many.

    Raises:
        UserError: there is no case, a value is no finite number, or the level is not between 0 and 1.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    _check(values, level)
    if np.ptp(values) == 0:  # all resampled means are this one
        return Interval(float(values[0]), float(values[0]), float(values[0]))
    found = stats.bootstrap(
        (values,),
        np.mean,
        confidence_level=level,
        n_resamples=resamples,
        batch=max(1, AT_A_TIME // len(values)),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(values.mean()), float(found.low), float(found.high))


def compare_paired(
    values: Values, others: Float[np.ndarray, " others"], level: float = 0.95, seed: int = 0, resamples: int = RESAMPLES
) -> Comparison:
    """The mean of ``values - others`` on the same cases, with its interval, and a test of no difference.

    The test exchanges the two models at random within each case (a paired permutation test): p is the share of
    exchanges, the observed one included, whose mean difference is at least as far from 0.

    Args:
        values: a metric of one model, for each case.
        others: of the other model, for the same cases in the same order.
        level: as in :func:`mean_interval`.
        seed: of the draws.
        resamples: how many; p is at least 1 / (resamples + 1), or exact where there are fewer exchanges.

    Raises:
        UserError: the two differ in number, or as in :func:`mean_interval`.

    Source: Smucker, Allan and Carterette, A comparison of statistical significance tests for information retrieval
        evaluation (2007).
    """
    if len(values) != len(others):
        raise UserError(f"{len(values)} values and {len(others)} others: models are compared on the same cases")
    _check(others, level)
    difference = mean_interval(values - others, level, seed, resamples)
    if not (values - others).any():
        return Comparison(*difference, p=1.0)
    found = stats.permutation_test(
        (values, others),
        lambda one, other, axis: np.mean(one - other, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, AT_A_TIME // len(values)),
        rng=np.random.default_rng(seed),
    )
    return Comparison(*difference, p=float(found.pvalue))


def by_group(values: Values, groups: Shaped[np.ndarray, " groups"], seed: int = 0) -> dict[str, tuple[int, Interval]]:
    """Number of cases and mean of each group, the groups in the order of their names.

    Args:
        values: of each case.
        groups: of each case, its group's name.
        seed: of the intervals.

    Raises:
        UserError: the two differ in number, or as in :func:`mean_interval`.
    """
    if len(values) != len(groups):
        raise UserError(f"{len(values)} values and {len(groups)} groups: each case has one of each")
    parts = {str(name): values[groups == name] for name in np.unique(groups)}
    return {name: (len(part), mean_interval(part, seed=seed)) for name, part in parts.items()}


def _check(values: Float[np.ndarray, " some"], level: float) -> None:
    if not len(values):
        raise UserError("there is no case: a mean needs at least one")
    if not np.isfinite(values).all():
        raise UserError(f"the value of case {int(np.argmin(np.isfinite(values))) + 1} is no finite number")
    if not 0 < level < 1:
        raise UserError(f"level {level} must lie between 0 and 1, such as 0.95")
