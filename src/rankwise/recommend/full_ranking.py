"""Where the true item stands among all titles, and what the lists of recommendations are like."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from rankwise.recommend.lists import coverage, novelty, popularity_lift
from rankwise.recommend.metrics import Scores, case_metrics

TOP = 10
CASES = (f"HR@{TOP} full", f"NDCG@{TOP} full", "MRR full")
LISTS = (f"coverage@{TOP}", f"novelty@{TOP}", f"popularity lift@{TOP}")


def full_ranking(
    rows: Sequence[Mapping[str, Any]],
    titles: Sequence[str],
    popularity: Mapping[str, int],
    scored: Iterable[tuple[int, Scores]],
) -> tuple[dict[str, float], pl.DataFrame]:
    """Rank the whole catalogue in each case, without what the user has seen but for the true item.

    Args:
        rows: the cases, each with ``target``, ``history`` and ``seen``.
        titles: the catalogue, each title once; every target is in it.
        popularity: how often each title occurs in the training part.
        scored: places of all rows, in any order, each with the scores of all titles.

    Returns:
        ``HR@10 full``, ``NDCG@10 full`` and ``MRR full``; of the users' ten best titles ``coverage@10``, ``novelty@10``
        in bits and ``popularity lift@10`` over their histories (left out where nobody's history is popular); and the
        first three of each case, in the order of the rows.
    """
    places = {title: place for place, title in enumerate(titles)}
    found: dict[int, dict[str, float]] = {}
    lists: dict[int, list[str]] = {}
    for at, scores in scored:
        row = rows[at]
        seen = [places[title] for title in row["seen"] if title != row["target"] and title in places]
        left = scores.astype(np.float64)
        left[seen] = -np.inf
        metrics = case_metrics(left, places[row["target"]], (TOP,))
        found[at] = {f"{name} full": value for name, value in metrics.items()}
        best = np.argsort(-left, kind="stable")[: min(TOP, len(titles) - len(seen))]
        lists[at] = [titles[place] for place in best]
    cases = pl.DataFrame([found[at] for at in range(len(rows))]).select(CASES)
    means = {name: float(cases[name].to_numpy().mean()) for name in CASES}
    shown, histories = [lists[at] for at in range(len(rows))], [row["history"] for row in rows]
    means |= {LISTS[0]: coverage(shown, titles), LISTS[1]: novelty(shown, popularity, titles)}
    if any(popularity.get(title) for history in histories for title in history):
        means[LISTS[2]] = popularity_lift(shown, histories, popularity)
    return means, cases
