"""What several seeds say of a method: mean, spread, interval, and the paired difference from another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scipy import stats

LEVEL = 0.95


class Spread(NamedTuple):
    """Mean, standard deviation (n - 1) and the ends of the 95 % interval of the mean, by Student's t; NaN for one."""

    mean: float
    deviation: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Of one value a seed; at least one."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Spread(mean, math.nan, math.nan, math.nan)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * deviation / math.sqrt(len(values))
    return Spread(mean, deviation, mean - half, mean + half)


class Difference(NamedTuple):
    """Mean of the paired differences, its 95 % interval and the p of the paired t-test; NaN where n < 2."""

    mean: float
    low: float
    high: float
    p: float


def paired(values: Mapping[int, float], others: Mapping[int, float]) -> Difference | None:
    """The difference of two methods over the seeds that both have; None where there is none.

    Where all differences are the same, p is 1 for a difference of 0, and NaN for any other: the test has no spread to
    compare it with, and scores that count cases are often equal by chance.
    """
    seeds = sorted(values.keys() & others.keys())
    if not seeds:
        return None
    found = spread([values[seed] - others[seed] for seed in seeds])
    if len(seeds) < 2:
        return Difference(found.mean, math.nan, math.nan, math.nan)
    if found.deviation <= 1e-9 * abs(found.mean):
        return Difference(found.mean, found.low, found.high, 1.0 if found.mean == 0 else math.nan)
    p = float(stats.ttest_rel([values[seed] for seed in seeds], [others[seed] for seed in seeds]).pvalue)
    return Difference(found.mean, found.low, found.high, p)


def holm(values: Sequence[float]) -> list[float]:
    """Holm's correction of several p: the i-th smallest of n times n - i + 1, never below an earlier one, at most 1.

    NaN stays NaN, and is not counted.

    Source: S. Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    order = sorted((index for index, value in enumerate(values) if not math.isnan(value)), key=lambda i: values[i])
    corrected, largest = list(values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * values[index]))
        corrected[index] = largest
    return corrected
