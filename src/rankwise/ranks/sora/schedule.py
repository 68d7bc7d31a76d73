"""Thresholds that rise from stage to stage, so that one training gives an adapter at each of several sizes."""

from __future__ import annotations

import math
from typing import Literal, get_args

from rankwise.errors import UserError

Spacing = Literal["linear", "log-linear", "exp-linear"]


def rising_thresholds(largest: float, stages: int, kind: Spacing = "linear", smallest: float = 0.0) -> list[float]:
    """Thresholds for stages that are trained one after the other, from ``smallest`` to ``largest``.

    With t from 0 to 1 in even steps, s the smallest and l the largest: ``linear`` is s + t (l - s); ``log-linear`` is
    log(e^s + t (e^l - e^s)), which near 0 is almost linear; ``exp-linear`` is s (l / s)^t, a constant ratio.

    Args:
        largest: of the last stage, in units of the gate.
        stages: how many, 1 or more; a single one has ``largest``.
        kind: how they are spaced.
        smallest: of the first stage, 0 or more; above 0 for ``exp-linear``.

    Returns:
        As many thresholds as stages, none smaller than the one before; the first and the last are exact.

    Raises:
        UserError: a value out of its range, or an unknown kind.

    Source: SoRA (arXiv 2311.11696), algorithm 1, and the spacings of its code. That has no number where ``exp-linear``
    starts at 0; here it is refused. It also hands the first stage's learning-rate schedule on, which has ended by then;
    a recipe's stages each begin their own.
    """
    _check(largest, stages, kind, smallest)
    if stages == 1:
        return [float(largest)]
    steps = [number / (stages - 1) for number in range(stages)]
    spaced = [_between(float(smallest), float(largest), step, kind) for step in steps[1:-1]]
    return [float(smallest), *(min(max(value, smallest), largest) for value in spaced), float(largest)]


def _between(smallest: float, largest: float, step: float, kind: str) -> float:
    if kind == "linear":
        return smallest + step * (largest - smallest)
    if kind == "exp-linear":
        return math.exp(math.log(smallest) + step * (math.log(largest) - math.log(smallest)))
    # l + log(t + (1 - t) e^(s - l)): e^l itself would be infinite from a threshold of 710 on.
    return largest + math.log1p((1 - step) * math.expm1(smallest - largest))


def _check(largest: float, stages: int, kind: str, smallest: float) -> None:
    if isinstance(stages, bool) or not isinstance(stages, int) or stages < 1:
        raise UserError(f"stages {stages!r} is not possible: it must be a whole number, 1 or more")
    if kind not in get_args(Spacing):
        raise UserError(f"spacing {kind!r} is unknown: {', '.join(get_args(Spacing))}")
    for name, value in {"smallest": smallest, "largest": largest}.items():
        if not 0 <= value < math.inf:
            raise UserError(f"{name} {value} is no threshold: it must be 0 or more, a finite number")
    if largest < smallest:
        raise UserError(f"largest {largest} is below smallest {smallest}: thresholds rise from stage to stage")
    if kind == "exp-linear" and smallest == 0:
        raise UserError("smallest 0 has no exp-linear spacing, which rises by a constant ratio: give one above 0")
