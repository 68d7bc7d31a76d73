"""All tasks of a comparison at once: each method's mean rank over them, with its scores side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import rankdata

from rankwise.analysis.columns import is_lower_better
from rankwise.comparing.advice import not_learned
from rankwise.comparing.statistics import Spread, spread
from rankwise.comparing.tables import FEW, Rows, lacking, ranked

WEIGHT = "A mean rank counts every task alike, however little its scores differ."


def mean_ranks(rows: Rows, seeds: int) -> dict[str, Spread]:
    """Each method's rank on a task by its score with a seed, averaged over the tasks: the spread over the seeds.

    1 is best; equal scores share the mean of their ranks. Only methods that have a score of every seed on every task
    are ranked, among themselves. The best mean comes first.
    """
    tasks = [_complete(own, seeds) for own in by_task(rows).values()]
    names = [name for name in tasks[0] if all(name in task for task in tasks)] if tasks else []
    if not names:
        return {}
    ranks = rankdata([[task[name] for name in names] for task in tasks], axis=1)  # tasks x methods x seeds
    found = {name: spread(own.tolist()) for name, own in zip(names, ranks.mean(axis=0), strict=True)}
    return dict(sorted(found.items(), key=lambda item: item[1].mean))


def by_task(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of each task."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["task"], []).append(row)
    return found


def _complete(rows: Rows, seeds: int) -> dict[str, list[float]]:
    """What less is better of, seed by seed, by the methods that have every one."""
    known = [row for row in ranked(rows, seeds) if not lacking(row, seeds)]
    sign = 1 if known and is_lower_better(known[0]["metric"]) else -1
    return {row["method"]: [sign * row["values"][seed] for seed in sorted(row["values"], key=int)] for row in known}


def _text(rank: Spread) -> str:
    return f"{rank.mean:.1f}" + ("" if math.isnan(rank.deviation) else f" ± {rank.deviation:.1f}")


def overview_grid(rows: Rows, seeds: int) -> list[list[str]]:
    """The table as texts: the heading, then the methods by their mean rank; those that have none come last."""
    tasks, ranks = by_task(rows), mean_ranks(rows, seeds)
    names = [*ranks, *(name for name in dict.fromkeys(row["method"] for row in rows) if name not in ranks)]
    heads = [f"{task}, {metric}" if (metric := _metric(own)) else task for task, own in tasks.items()]
    lines = []
    for name in names:
        own = [next((row for row in task if row["method"] == name), None) for task in tasks.values()]
        rank = _text(ranks[name]) if name in ranks else "-"
        lines.append([name, rank, *(_score(row, seeds) for row in own), _parameters(own)])
    return [["method", "mean rank", *heads, "parameters"], *lines]


def _metric(rows: Rows) -> str:
    return next((row["metric"] for row in rows if row["metric"]), "")


def _score(row: Mapping[str, Any] | None, seeds: int) -> str:
    if row is None or row["mean"] is None:
        return "-"
    lacks = lacking(row, seeds)
    return f"{row['mean']:.4f}" + (f", {lacks}" if lacks else "")


def _parameters(rows: Sequence[Mapping[str, Any] | None]) -> str:
    known = [row["parameters"] for row in rows if row and row["parameters"] is not None]
    return f"{max(known):,}" if known else "-"


def overview_caption(rows: Rows, seeds: int) -> str:
    """What the table shows."""
    tasks, number = len(by_task(rows)), len(mean_ranks(rows, seeds))
    over = f"seeds and tasks ± standard deviation over {seeds} seeds" if seeds > 1 else "tasks"
    return (
        f"all {tasks} tasks: a method's rank (1 is best) among the {number} methods that have every seed of each, mean "
        f"over {over}; mean scores; trained parameters, the most on any task"
    )


def overall(results: Mapping[str, Any]) -> str:
    """Which method to take for all tasks together, and which where parameters are to be few."""
    rows, seeds = results["rows"], len(results["seeds"])
    ranks, number = mean_ranks(rows, seeds), len(by_task(rows))
    if not ranks:
        return f"No method has a score of every seed on each of the {number} tasks."
    first, *others = ranks
    said = f"Over the {number} tasks {first} has the best mean rank, {_text(ranks[first])} of {len(ranks)}"
    if others:
        said += f"; next: {', '.join(f'{name} ({_text(ranks[name])})' for name in others[:2])}"
    most = {name: max(row["parameters"] or 0 for row in rows if row["method"] == name) for name in ranks}
    if unlearned := [task for task in by_task(rows) if not_learned(results, task)]:
        said += f". No method is seen to learn {' and '.join(unlearned)}"
    if few := next((name for name in others if FEW * most[name] <= most[first]), None):
        least = f"{few} has the best, {_text(ranks[few])}, with {most[few]:,}"
        said += f". Of the methods with at most a tenth of {first}'s {most[first]:,} parameters, {least}"
    return f"{said}."
