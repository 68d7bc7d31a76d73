"""The table of a task: its rows in order, and their texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rankwise.analysis.columns import is_lower_better
from rankwise.analysis.drawing import is_finite

Rows = Sequence[Mapping[str, Any]]

HEAD = ("method", "score", "95 % interval", "difference", "p", "parameters", "ms a step", "peak MiB", "rate")
CHOSEN = ("rank", "budget")  # further columns, where they were tried
FEW = 10  # times fewer parameters than the best are few


def by_task(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of each task, in the order of the tasks."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["task"], []).append(row)
    return found


def ranked(rows: Rows, seeds: int) -> list[Mapping[str, Any]]:
    """A task's methods that have a score, the best mean first; behind them all those without one of every seed."""
    known = [row for row in rows if is_finite(row["mean"])]
    sign = 1 if known and is_lower_better(known[0]["metric"]) else -1
    return sorted(known, key=lambda row: (len(row["values"]) < seeds, sign * row["mean"]))


def lacking(row: Mapping[str, Any], seeds: int) -> str:
    """How many seeds a method's mean is over, where these are not all."""
    number = len(row["values"])
    return f"{number} of {seeds} seeds" if number < seeds else ""


def grid(rows: Rows, seeds: int) -> list[list[str]]:
    """A task's table as texts: the heading, then its rows as they are ranked; what was not possible last."""
    chosen = [name for name in CHOSEN if any(row[name] is not None for row in rows)]
    ordered = [*ranked(rows, seeds), *(row for row in rows if row["mean"] is None)]
    return [[*HEAD, *chosen], *(_texts(row, chosen, lacking(row, seeds)) for row in ordered)]


def _texts(row: Mapping[str, Any], chosen: Sequence[str], lacks: str) -> list[str]:
    if row["mean"] is None:
        return [row["method"], "not possible" if row["failed"] else "-", *["-"] * (len(HEAD) + len(chosen) - 2)]
    score = f"{row['mean']:.4f}" + ("" if row["deviation"] is None else f" ± {row['deviation']:.4f}")
    score += f", {lacks}" if lacks else ""
    difference = "-" if row["difference"] is None else f"{row['difference']:+.4f}"
    p = "-" if row["p_holm"] is None else f"{row['p_holm']:.2g}"
    left = row["parameters_left"]
    parameters = f"{row['parameters']:,}" + (f", {left:,.0f} left" if left is not None else "")
    step = "-" if row["step_seconds"] is None else f"{1000 * row['step_seconds']:.1f}"
    memory = "-" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**20:,.0f}"
    interval = "-" if row["low"] is None else f"{row['low']:.4f} to {row['high']:.4f}"
    settings = ["-" if row[name] is None else f"{row[name]:g}" for name in ("learning_rate", *chosen)]
    return [row["method"], score, interval, difference, p, parameters, step, memory, *settings]


def caption(rows: Rows, seeds: int, against: str) -> str:
    """What a task's table shows."""
    metric = next((row["metric"] for row in rows if row["metric"]), "no score")
    better = "less" if is_lower_better(metric) else "more"
    over = f"{seeds} seeds" if seeds > 1 else "one seed"
    if any(row["values"] and lacking(row, seeds) for row in rows):
        over += " (of fewer where the row says so: these rows come last)"
    return (
        f"{metric} ({better} is better), mean and standard deviation over {over}; "
        f"difference from {against}, paired by seed, and p of a t-test, by Holm's correction"
    )


def search_note(rows: Rows) -> str:
    """Of which of a task's methods the search did not choose the setting, and why; empty where it chose all."""
    why: dict[str, list[str]] = {}
    for row in rows:
        if reason := row.get("undecided"):  # summaries of earlier versions do not say
            why.setdefault(reason, []).append(row["method"])
    if not why:
        return ""
    number, said = sum(map(len, why.values())), [f"{', '.join(names)} ({reason})" for reason, names in why.items()]
    taken = "of equal ones that with the least training loss was taken, and where all failed the first listed"
    return f"The search did not choose the setting of {number} of {len(rows)} methods ({taken}): {'; '.join(said)}."
