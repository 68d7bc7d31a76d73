"""Rising thresholds, against numpy's own spacings, by hand, and for properties that hold whatever the numbers are."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import get_args

import jaxtyping
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rankwise.errors import UserError
from rankwise.ranks import rising_thresholds
from rankwise.ranks.sora.schedule import Spacing

KINDS = list(get_args(Spacing))


def published(kind: str, smallest: float, largest: float, stages: int) -> np.ndarray:
    """The spacings as they are defined, with the exponentials taken."""
    if kind == "linear":
        return np.linspace(smallest, largest, stages)
    if kind == "log-linear":
        return np.log(np.linspace(np.exp(smallest), np.exp(largest), stages))
    return np.geomspace(smallest, largest, stages)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("smallest", "largest"), [(1e-5, 7e-4), (0.5, 3.0), (2.0, 2.0)])
@pytest.mark.parametrize("stages", [2, 3, 7])
def test_spacings_are_those_of_numpy(kind: str, smallest: float, largest: float, stages: int) -> None:
    found = rising_thresholds(largest, stages, kind, smallest)
    np.testing.assert_allclose(found, published(kind, smallest, largest, stages), rtol=1e-9, atol=1e-15)


def test_the_papers_schedule() -> None:
    """Seven stages from 0 to 7e-4: steps of 7e-4 / 6."""
    found = rising_thresholds(7e-4, 7)
    assert found == pytest.approx([0.0, 7e-4 / 6, 14e-4 / 6, 3.5e-4, 28e-4 / 6, 35e-4 / 6, 7e-4], abs=1e-18)


def test_by_hand() -> None:
    """log((1 + e) / 2) = 0.6201145; the middle of 1 and 4 is 2.5, by ratios 2."""
    assert rising_thresholds(1.0, 3, "log-linear") == pytest.approx([0.0, 0.6201145069582776, 1.0])
    assert rising_thresholds(4.0, 3, "linear", 1.0) == pytest.approx([1.0, 2.5, 4.0])
    assert rising_thresholds(4.0, 3, "exp-linear", 1.0) == pytest.approx([1.0, 2.0, 4.0])


def test_a_single_stage_has_the_largest() -> None:
    assert [rising_thresholds(0.5, 1, kind, 0.25) for kind in KINDS] == [[0.5]] * 3


thresholds = st.floats(min_value=0.0, max_value=1e300, allow_subnormal=False)


@given(st.sampled_from(KINDS), thresholds, thresholds, st.integers(1, 40))
def test_they_rise_within_their_ends(kind: str, one: float, other: float, stages: int) -> None:
    smallest, largest = sorted((one, other))
    assume(kind != "exp-linear" or smallest > 0)
    found = rising_thresholds(largest, stages, kind, smallest)
    assert len(found) == stages and found[-1] == largest
    assert stages == 1 or found[0] == smallest
    assert all(low <= high for low, high in pairwise(found))
    assert all(map(math.isfinite, found))


@given(st.floats(1e-6, 20.0), st.floats(1.01, 50.0), st.integers(3, 20))
def test_log_linear_lies_above_linear_and_exp_linear_below(smallest: float, ratio: float, stages: int) -> None:
    """The logarithm is concave, the exponential convex."""
    linear, log_linear, exp_linear = (
        rising_thresholds(ratio * smallest, stages, kind, smallest)[1:-1] for kind in KINDS
    )
    slack = 1e-9 * ratio * smallest
    assert all(low <= high + slack for low, high in zip(linear, log_linear, strict=True))
    assert all(low <= high + slack for low, high in zip(exp_linear, linear, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, 0), "stages 0 is not possible: it must be a whole number, 1 or more"),
        ((1.0, True), "stages True is not possible"),
        ((1.0, 3, "linear", 2.0), "largest 1.0 is below smallest 2.0: thresholds rise from stage to stage"),
        ((-1.0, 3), "largest -1.0 is no threshold: it must be 0 or more, a finite number"),
        ((1.0, 3, "linear", -0.5), "smallest -0.5 is no threshold"),
        ((math.inf, 3), "largest inf is no threshold"),
        ((math.nan, 3), "largest nan is no threshold"),
        ((1.0, 3, "linear", math.nan), "smallest nan is no threshold"),
        ((1.0, 3, "exp-linear"), "smallest 0 has no exp-linear spacing, .*: give one above 0"),
    ],
)
def test_mistakes(arguments: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        rising_thresholds(*arguments)


def test_an_unknown_spacing() -> None:
    """Tests check types at the call; without that check the function refuses it itself."""
    with pytest.raises((UserError, jaxtyping.TypeCheckError), match="cubic"):
        rising_thresholds(1.0, 3, "cubic")
