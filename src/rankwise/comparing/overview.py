"""All tasks of a comparison at once: each method's mean rank over them, with its scores side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from scipy.stats import rankdata

from rankwise.analysis.columns import is_lower_better
from rankwise.comparing.advice import not_learned
from rankwise.comparing.statistics import Spread, spread
from rankwise.comparing.tables import FEW, Rows, by_task, lacking, ranked

UNTESTED = "Ranks count the tasks alike, are not tested, and depend on which methods are compared."


class Overview(NamedTuple):
    """Of several tasks.

    Attributes:
        seeds: how many.
        tasks: the rows of each.
        ranked: those on which methods are ranked: some method has a score of every seed, and some is seen to learn it.
        ranks: of each method that has every seed of all of these, the rank by its score with a seed, averaged over the
            tasks: the spread over the seeds. 1 is best; equal scores share the mean of their ranks. The best comes
            first, of equal ones that with the fewest parameters.
    """

    seeds: int
    tasks: dict[str, list[Mapping[str, Any]]]
    ranked: tuple[str, ...]
    ranks: dict[str, Spread]

    @property
    def methods(self) -> list[str]:
        """All of them, those that have a rank first."""
        names = dict.fromkeys(row["method"] for rows in self.tasks.values() for row in rows)
        return [*self.ranks, *(name for name in names if name not in self.ranks)]

    def parameters(self, method: str) -> int | None:
        """Those that it trains, the most on any task."""
        found = [row["parameters"] for rows in self.tasks.values() for row in rows if row["method"] == method]
        return max((number for number in found if number is not None), default=None)


def overview_of(results: Mapping[str, Any]) -> Overview:
    """From what ``summary.json`` holds."""
    seeds, tasks = len(results["seeds"]), by_task(results["rows"])
    whole = {task: values for task, rows in tasks.items() if (values := _whole(rows, seeds))}
    learned = tuple(task for task in whole if not not_learned(results, task))
    overview = Overview(seeds, tasks, learned, _mean_ranks([whole[task] for task in learned]))

    def place(method: str) -> tuple[float, int]:
        return round(overview.ranks[method].mean, 9), overview.parameters(method) or 0

    return overview._replace(ranks={name: overview.ranks[name] for name in sorted(overview.ranks, key=place)})


def _whole(rows: Rows, seeds: int) -> dict[str, list[float]]:
    """What less is better of, seed by seed, by the methods that have every one."""
    known = [row for row in ranked(rows, seeds) if not lacking(row, seeds)]
    sign = 1 if known and is_lower_better(known[0]["metric"]) else -1
    return {row["method"]: [sign * row["values"][seed] for seed in sorted(row["values"], key=int)] for row in known}


def _mean_ranks(tasks: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, Spread]:
    names = [name for name in tasks[0] if all(name in task for task in tasks)] if tasks else []
    if not names:
        return {}
    ranks = rankdata([[task[name] for name in names] for task in tasks], axis=1)  # tasks x methods x seeds
    return {name: spread(own.tolist()) for name, own in zip(names, ranks.mean(axis=0), strict=True)}


def overview_grid(overview: Overview) -> list[list[str]]:
    """The table as texts: the heading, then the methods by their mean rank; those that have none come last."""
    heads = [f"{task}, {metric}" if (metric := _metric(rows)) else task for task, rows in overview.tasks.items()]
    lines = []
    for name in overview.methods:
        own = [next((row for row in rows if row["method"] == name), None) for rows in overview.tasks.values()]
        rank = _text(overview.ranks[name]) if name in overview.ranks else "-"
        number = overview.parameters(name)
        scores = [_score(row, overview.seeds) for row in own]
        lines.append([name, rank, *scores, "-" if number is None else f"{number:,}"])
    return [["method", "mean rank", *heads, "parameters"], *lines]


def _text(rank: Spread) -> str:
    return f"{rank.mean:.1f}" + ("" if math.isnan(rank.deviation) else f" ± {rank.deviation:.1f}")


def _metric(rows: Rows) -> str:
    return next((row["metric"] for row in rows if row["metric"]), "")


def _score(row: Mapping[str, Any] | None, seeds: int) -> str:
    if row is None or row["mean"] is None:
        return "-"
    lacks = lacking(row, seeds)
    return f"{row['mean']:.4f}" + (f", {lacks}" if lacks else "")


def overview_caption(overview: Overview, scores: bool = True) -> str:
    """What the table shows, with its scores or without."""
    over = f"{len(overview.ranked)} tasks"
    if overview.seeds > 1:
        over = f"seeds and {over} ± standard deviation over {overview.seeds} seeds"
    metrics = dict.fromkeys(map(_metric, overview.tasks.values()))
    less = [name for name in metrics if name and is_lower_better(name)]
    means = "mean scores" + (f" (of {_listed(less)} less is better)" if less else "") + "; "
    return (
        f"all tasks: a method's rank (1 is best) among the {len(overview.ranks)} that have every seed of each, mean "
        f"over {over}; {means if scores else ''}trained parameters, the most on any task"
    )


def overview_note(overview: Overview) -> str:
    """What is not ranked, and what ranks do not say."""
    others = [task for task in overview.tasks if task not in overview.ranked]
    said = [f"Not ranked on {_listed(others)}, which no method is seen to learn with every seed."] if others else []
    if lost := [name for name in overview.methods if name not in overview.ranks]:
        said.append(f"Left out of the ranks, without a score of every seed on each task: {', '.join(lost)}.")
    return " ".join([*said, UNTESTED])


def overall(overview: Overview) -> str:
    """Which method to take for all tasks together, and which where parameters are to be few."""
    ranks, number = overview.ranks, len(overview.ranked)
    if not ranks:
        return "No method has a score of every seed on each task that is learned."
    best = min(rank.mean for rank in ranks.values())
    firsts = [name for name, rank in ranks.items() if math.isclose(rank.mean, best, abs_tol=1e-9)]
    others = [name for name in ranks if name not in firsts]
    over = f"Over {number} tasks" if number > 1 else f"On {overview.ranked[0]}"
    if len(ranks) == 1:
        return f"{over} {firsts[0]} alone has a score of every seed."
    have = "has" if len(firsts) == 1 else "have"
    said = f"{over} {_listed(firsts)} {have} the best mean rank, {_text(ranks[firsts[0]])} of {len(ranks)}"
    if others:
        said += f"; next: {', '.join(f'{name} ({_text(ranks[name])})' for name in others[:2])}"
    most = {name: overview.parameters(name) or 0 for name in ranks}
    if few := next((name for name in others if FEW * most[name] <= most[firsts[0]]), None):
        least = f"{few} has the best, {_text(ranks[few])}, with {most[few]:,}"
        said += f". Of the methods with at most a tenth of {firsts[0]}'s {most[firsts[0]]:,} parameters, {least}"
    return f"{said}."


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
