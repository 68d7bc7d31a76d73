"""Each method's setting, chosen by successive halving on held-out data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from rankwise.analysis.columns import is_lower_better
from rankwise.comparing.cells import Cell, Setting, make_cell, settings
from rankwise.errors import UserError, nearest
from rankwise.schema import Comparison

Key = tuple[str, str]  # of a task and a method


def deciding_metric(comparison: Comparison, task: str, columns: Sequence[str]) -> str:
    """The metric that decides on a task.

    Raises:
        UserError: the comparison names one that the task has not.
    """
    wanted = comparison.metrics.get(task, columns[0])
    if wanted not in columns:
        raise UserError(f"metrics.{task} {wanted!r} is not measured there: {nearest(wanted, columns)}")
    return wanted


def final_row(result: dict[str, Any]) -> dict[str, Any] | None:
    """The row of a cell's last stage; None where the run failed."""
    return None if result.get("failed") else result["rows"][-1]


def score(comparison: Comparison, cell: Cell, result: dict[str, Any]) -> float:
    """What decides, turned so that more is better; -inf where the run failed."""
    row = final_row(result)
    if row is None:
        return -math.inf
    metric = deciding_metric(comparison, cell.task, result["columns"])
    value = row["metrics"].get(metric)
    if value is None or not math.isfinite(value):
        return -math.inf
    return -float(value) if is_lower_better(metric) else float(value)


def training_loss(result: dict[str, Any]) -> float:
    """The mean of the last tenth of the losses that the training logged; infinite where it logged none."""
    losses = [loss for _, loss in result.get("curve") or []]
    return fmean(losses[-max(1, len(losses) // 10) :]) if losses else math.inf


def choose(comparison: Comparison, run: Callable[[Sequence[Cell]], None]) -> dict[Key, Setting]:
    """The setting of each method on each task.

    All settings are tried on a share ``first`` of the epochs; the best part, one in ``factor`` and at least one, on
    ``factor`` times as much, and so on, until one is left or all epochs were run. With several seeds in the search the
    mean over them decides; a setting that failed with one of them comes last. Of equal ones (on few rows all may give
    the most frequent label) those come first that have less training loss. Where every setting failed in a round, none
    goes on, and the first of them is taken.

    Args:
        comparison: checked.
        run: runs cells that are not finished.
    """
    left = {
        (task, entry.name): settings(comparison, entry) for task in comparison.tasks for entry in comparison.methods
    }
    share = comparison.search.first
    while any(len(tried) > 1 for tried in left.values()):
        rounds = {key: _round(comparison, key, tried, share) for key, tried in left.items() if len(tried) > 1}
        run([cell for found in rounds.values() for cells in found.values() for cell in cells])
        for key, found in rounds.items():
            places = {setting: _place(comparison, cells) for setting, cells in found.items()}
            ordered = sorted(found, key=places.__getitem__)
            ended = share >= 1 or places[ordered[0]][0] == math.inf
            left[key] = ordered[: 1 if ended else max(1, len(found) // comparison.search.factor)]
        share = min(1.0, share * comparison.search.factor)
    return {key: tried[0] for key, tried in left.items()}


def _place(comparison: Comparison, cells: Sequence[Cell]) -> tuple[float, float]:
    results = [(cell, cell.result() or {}) for cell in cells]
    losses = [training_loss(result) for _, result in results]
    return -fmean(score(comparison, cell, result) for cell, result in results), fmean(losses)


def _round(comparison: Comparison, key: Key, tried: Sequence[Setting], share: float) -> dict[Setting, list[Cell]]:
    """The runs of each setting, one for each seed of the search."""
    entry = next(one for one in comparison.methods if one.name == key[1])
    make = partial(make_cell, comparison, key[0], entry, share=share, part="search")
    seeds = comparison.search.seeds_of.get(key[0], comparison.search.seeds)
    return {setting: [make(setting=setting, seed=seed) for seed in seeds] for setting in tried}
