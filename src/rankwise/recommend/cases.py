"""Case by case: where the true item stands, so that means get intervals and models are compared on the same cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from rankwise.recommend.lists import activity_groups, popularity_groups
from rankwise.recommend.metrics import Scores, case_metrics
from rankwise.recommend.uncertainty import mean_interval

ABOUT = {"user": pl.String, "target": pl.String, "group": pl.String}  # the columns that are no metrics
ACTIVITY = "activity"  # one more, where it is known what the users chose


def ranked_cases(
    users: Sequence[str],
    targets: Sequence[str],
    scores: Sequence[Scores],
    places: Sequence[int],
    popularity: Mapping[str, int],
    cutoffs: Sequence[int] = (1, 5),
    chosen: Sequence[int] = (),
) -> pl.DataFrame:
    """A row a case: ``user``, ``target``, its popularity ``group``, and the metrics of :func:`case_metrics`.

    And the group of the user by ``activity``, where it is told.

    Args:
        users: of each case.
        targets: the true title of each.
        scores: of each, one score a candidate.
        places: of each, where the true title stands among its candidates.
        popularity: how often each title occurs in the training part.
        cutoffs: of HR and NDCG.
        chosen: of each, how many titles the user chose.
    """
    metrics = [case_metrics(one, place, cutoffs) for one, place in zip(scores, places, strict=True)]
    about = pl.DataFrame(
        {"user": list(users), "target": list(targets), "group": popularity_groups(targets, popularity)}, schema=ABOUT
    )
    if chosen:
        about = about.with_columns(pl.Series(ACTIVITY, activity_groups(chosen)))
    return about.hstack(pl.DataFrame(metrics))


def metric_names(cases: pl.DataFrame) -> list[str]:
    """The columns that are metrics."""
    return [name for name in cases.columns if name not in (*ABOUT, ACTIVITY)]


def values(cases: pl.DataFrame, name: str) -> np.ndarray:
    """One metric of every case that has it."""
    return cases[name].drop_nulls().cast(pl.Float64).to_numpy()


def means(cases: pl.DataFrame) -> dict[str, float]:
    """The mean of each metric."""
    return {name: float(values(cases, name).mean()) for name in metric_names(cases)}


def intervals(cases: pl.DataFrame) -> dict[str, list[float]]:
    """The two ends of the 95 % bootstrap interval of each mean."""
    found = {name: mean_interval(values(cases, name)) for name in metric_names(cases)}
    return {name: [one.low, one.high] for name, one in found.items()}
