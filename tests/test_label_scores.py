"""Scores of labels and values, against their formulas written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import rankdata

from rankwise.errors import UserError
from rankwise.tasks.label_scores import label_scores


@pytest.mark.parametrize("seed", range(5))
def test_two_labels_by_their_confusion(seed: int) -> None:
    random = np.random.default_rng(seed)
    outputs, truth = random.normal(size=(40, 2)), random.integers(0, 2, 40)
    chosen = outputs[:, 1] > outputs[:, 0]
    right, wrong = (chosen & (truth == 1)).sum(), (chosen & (truth == 0)).sum()
    missed, left = (~chosen & (truth == 1)).sum(), (~chosen & (truth == 0)).sum()
    product = (right + wrong) * (right + missed) * (left + wrong) * (left + missed)
    found = label_scores(("accuracy", "F1", "Matthews"), outputs, truth)
    assert found["accuracy"] == pytest.approx((right + left) / 40)
    assert found["F1"] == pytest.approx(2 * right / (2 * right + wrong + missed))
    assert found["Matthews"] == pytest.approx((right * left - wrong * missed) / product**0.5)


@pytest.mark.parametrize("seed", range(5))
def test_more_labels(seed: int) -> None:
    """F1 is the mean over labels; Matthews the correlation of the two sets of indicators (Gorodkin 2004)."""
    random = np.random.default_rng(seed)
    outputs, truth = random.normal(size=(60, 4)), random.integers(0, 4, 60)
    chosen, real = np.eye(4)[outputs.argmax(1)], np.eye(4)[truth]
    each = 2 * (chosen * real).sum(0) / (chosen.sum(0) + real.sum(0))
    x, y = chosen - chosen.mean(0), real - real.mean(0)
    found = label_scores(("F1", "Matthews"), outputs, truth)
    assert found["F1"] == pytest.approx(each.mean())
    assert found["Matthews"] == pytest.approx((x * y).sum() / ((x * x).sum() * (y * y).sum()) ** 0.5)


@pytest.mark.parametrize("seed", range(5))
def test_values(seed: int) -> None:
    """With ties, whose ranks are their mean."""
    random = np.random.default_rng(seed)
    truth = random.integers(0, 6, 50).astype(float)
    outputs = (truth + random.normal(size=50)).round(0)[:, None]
    found = label_scores(("Pearson", "Spearman"), outputs, truth)
    assert found["Pearson"] == pytest.approx(np.corrcoef(outputs[:, 0], truth)[0, 1])
    assert found["Spearman"] == pytest.approx(np.corrcoef(rankdata(outputs[:, 0]), rankdata(truth))[0, 1])


def test_outputs_that_are_all_the_same_correlate_with_nothing() -> None:
    assert label_scores(("Pearson", "Spearman"), np.ones((3, 1)), np.array([1.0, 2.0, 3.0])) == {
        "Pearson": 0.0,
        "Spearman": 0.0,
    }
    assert label_scores(("Matthews", "F1"), np.eye(2)[[0, 0]], np.array([0, 1])) == {"Matthews": 0.0, "F1": 0.0}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_that_are_no_number_have_no_score(value: float) -> None:
    """The largest of them would be some label."""
    found = label_scores(["accuracy", "F1", "Matthews"], np.array([[0.0, 1.0], [value, 0.0]]), np.array([1, 0]))
    assert list(found) == ["accuracy", "F1", "Matthews"] and all(map(math.isnan, found.values()))


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(UserError, match="there are no predictions to score"):
        label_scores(("accuracy",), np.zeros((0, 2)), np.zeros(0))
    with pytest.raises(UserError, match="all 2 rows have the label 1, of which there is no Matthews"):
        label_scores(("accuracy", "Matthews"), np.eye(2), np.array([1, 1]))
    assert label_scores(("accuracy",), np.eye(2), np.array([1, 1])) == {"accuracy": 0.5}
