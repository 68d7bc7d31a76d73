"""Scores of predicted labels and values, by GLUE's measures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Shaped
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from rankwise.errors import UserError

LabelMetric = Literal["accuracy", "F1", "Matthews", "Pearson", "Spearman"]
SPREAD: tuple[LabelMetric, ...] = ("Matthews", "Pearson", "Spearman")  # undefined for one label or value alone


def label_scores(
    metrics: Sequence[LabelMetric], outputs: Float[np.ndarray, "rows classes"], truth: Shaped[np.ndarray, " rows"]
) -> dict[str, float]:
    """Each metric of a head's outputs.

    Args:
        metrics: accuracy; F1 of the second of two labels, the mean over labels where there are more; Matthews
            correlation; Pearson and Spearman correlation. The first three take each row's label of the largest output,
            the last two the only output. A correlation with outputs that are all the same is 0; where an output is
            not finite, no metric is a number.
        outputs: of each row and label; one column of values where ``truth`` are values.
        truth: each row's label, by number, or value.

    Raises:
        UserError: as :func:`check_truth`.
    """
    check_truth(metrics, truth)
    if not np.isfinite(outputs).all():
        return dict.fromkeys(metrics, math.nan)
    return {name: float(np.nan_to_num(MEASURES[name](outputs, truth))) for name in metrics}


def check_truth(metrics: Sequence[LabelMetric], truth: Shaped[np.ndarray, " rows"]) -> None:
    """See that labels or values can be scored.

    Raises:
        UserError: there is no row, or a correlation is asked for and all of ``truth`` is the same.
    """
    if len(truth) == 0:
        raise UserError("there are no predictions to score: give one row or more")
    undefined = [name for name in metrics if name in SPREAD]
    if undefined and len(set(truth.tolist())) == 1:
        raise UserError(
            f"all {len(truth)} rows have the label {truth[0]}, of which there is no {undefined[0]}: add rows"
        )


def _f1(outputs: np.ndarray, truth: np.ndarray) -> float:
    average = "binary" if outputs.shape[1] == 2 else "macro"
    return float(f1_score(truth, outputs.argmax(-1), average=average, zero_division=0))


def _correlation(found: Callable[..., object], outputs: np.ndarray, truth: np.ndarray) -> float:
    if np.ptp(outputs[:, 0]) == 0:
        return 0.0
    return float(found(outputs[:, 0], truth).statistic)  # type: ignore[attr-defined]


MEASURES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": lambda outputs, truth: float(accuracy_score(truth, outputs.argmax(-1))),
    "F1": _f1,
    "Matthews": lambda outputs, truth: float(matthews_corrcoef(truth, outputs.argmax(-1))),
    "Pearson": lambda outputs, truth: _correlation(pearsonr, outputs, truth),
    "Spearman": lambda outputs, truth: _correlation(spearmanr, outputs, truth),
}
