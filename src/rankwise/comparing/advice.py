"""What a comparison advises: which method to take, and what else speaks for one, or against all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rankwise.analysis.columns import is_lower_better
from rankwise.analysis.drawing import is_finite
from rankwise.comparing.figures import unbeaten
from rankwise.comparing.statistics import holm, paired
from rankwise.comparing.tables import FEW, lacking, ranked

LEVEL = 0.05
SHARES = ("accuracy", "HR@1")  # metrics that are shares of the cases
TESTED = (
    "Tests are over the seeds, on these held-out rows: they tell whether other seeds would say the same, roughly where "
    "seeds are few, and not whether other rows would. What they do not tell apart need not be the same."
)
Rows = Sequence[Mapping[str, Any]]


def advice(results: Mapping[str, Any], task: str) -> str:
    """Which method to take: the best, and from how many the seeds do not tell it apart.

    Methods without a score of every seed are not looked at.
    """
    rows, seeds = whole(results, task), f"{len(results['seeds'])} seeds"
    if not rows:
        return f"{task}: no method gave a score{' of every seed' if scored(results, task) else ''}."
    best, alike = rows[0], _alike(rows)
    score = f"{best['metric']}, {best['mean']:.4g}"
    if len(rows) == 1:
        return f"{task}: {best['method']} has {score}, and no other method gave a score of every seed."
    if not alike:
        return f"{task}: {best['method']} has the best {score}; one seed tells no differences."
    start = f"{task}: {best['method']} has the best mean {score}, with {best['parameters']:,} parameters"
    if len(alike) == 1:
        return f"{start}, and {seeds} tell every other method apart from it (paired tests)."
    return f"{start}. {seeds} do not tell {len(alike) - 1} more apart from it (paired tests)."


def _alike(rows: Rows) -> list[Mapping[str, Any]]:
    """The first row, which is the best, with those that a paired test does not tell apart from it; none of one seed.

    A difference that is the same at every seed, for which there is no p, is told apart. All have the same seeds.
    """
    if len(rows[0]["values"]) < 2:
        return []
    tests = [paired(_values(rows[0]), _values(row)) for row in rows[1:]]
    p = holm([test.p for test in tests if test])
    return [rows[0], *(row for row, value in zip(rows[1:], p, strict=True) if value >= LEVEL)]


def qualified(results: Mapping[str, Any], task: str) -> list[str]:
    """What else speaks for a method, or against all.

    Which are left out; differences that other cases may turn; that none is seen to learn; by the means, few parameters
    where the best trains many, and little forgotten.
    """
    rows = whole(results, task)
    said = _left_out(results, task)
    if not rows:
        return said
    best, base = rows[0], results["base"].get(task) or {}
    said += [*_near(rows), *not_learned(results, task)]
    few = [row for row in rows if FEW * row["parameters"] <= best["parameters"]]
    if few:
        named = f"{few[0]['method']} has the best mean, {few[0]['mean']:.4g}"
        said.append(f"Of the methods with at most a tenth of {best['method']}'s parameters, {named}.")
    fronts: dict[tuple[str, ...], list[str]] = {}
    for name in forgotten_metrics(results, task, rows):
        if is_finite(base.get(name)):
            front = tuple(row["method"] for row in unbeaten(rows, best["metric"], name, base[name]))
            fronts.setdefault(front, []).append(name.removesuffix(" loss"))
    for front, names in fronts.items():
        if front:
            what = f"in both score and what is forgotten of {' and '.join(names)}"
            said.append(f"By the means not beaten {what}: {', '.join(front)}, what forgets least first.")
    return said


def _left_out(results: Mapping[str, Any], task: str) -> list[str]:
    seeds = len(results["seeds"])
    known = [(row["method"], lacking(row, seeds)) for row in results["rows"] if row["task"] == task]
    names = ", ".join(f"{name} ({lacks})" for name, lacks in known if lacks)
    return [f"Left out, without a score of every seed: {names}."] if names else []


def _near(rows: Rows) -> list[str]:
    """How many are nearer to the best than the standard error of a share of the cases, sqrt(p (1 - p) / n)."""
    best, number = rows[0], rows[0].get("cases")
    if best["metric"] not in SHARES or not number:
        return []
    error = math.sqrt(max(0.0, best["mean"] * (1 - best["mean"])) / number)
    near = sum(best["mean"] - row["mean"] < error for row in rows[1:])
    if not near:
        return []
    start = f"On {number:,} cases {best['metric']} has a standard error of {error:.2g}"
    return [f"{start}: the difference from the best is less for {near} of {len(rows) - 1} others."]


def not_learned(results: Mapping[str, Any], task: str) -> list[str]:
    """That no method's interval is better than what needs no training; nothing where one is, or it is not known."""
    rows, base, frequent = scored(results, task), results["base"].get(task) or {}, most_frequent(results, task)
    if not rows:
        return []
    metric = rows[0]["metric"]
    lower = is_lower_better(metric)
    ends = [end for row in rows if is_finite(end := row["high" if lower else "low"])]
    known = {"the score before any training": base.get(metric), "the most frequent label's": frequent.get(metric)}
    beaten = {what: value for what, value in known.items() if is_finite(value)}
    if not (beaten and ends):
        return []
    hardest = (min if lower else max)(beaten, key=beaten.__getitem__)
    if any(end < beaten[hardest] if lower else end > beaten[hardest] for end in ends):
        return []
    said = f"No method's 95 % interval is better than {hardest}, {beaten[hardest]:.4g}"
    return [f"{said}: none is seen to learn this task."]


def most_frequent(results: Mapping[str, Any], task: str) -> Mapping[str, Any]:
    """Metrics of the training rows' most frequent label; none where a task has no labels, or an earlier version ran."""
    found: Mapping[str, Any] = results.get("frequent", {}).get(task) or {}
    return found


def _values(row: Mapping[str, Any]) -> dict[int, float]:
    return {int(seed): value for seed, value in row["values"].items()}


def scored(results: Mapping[str, Any], task: str) -> list[Mapping[str, Any]]:
    """The task's methods that have a score, as they are ranked."""
    return ranked([row for row in results["rows"] if row["task"] == task], len(results["seeds"]))


def whole(results: Mapping[str, Any], task: str) -> list[Mapping[str, Any]]:
    """Those of the task's methods that have a score of every seed: only these can be the best."""
    return [row for row in scored(results, task) if not lacking(row, len(results["seeds"]))]


def forgotten_metrics(results: Mapping[str, Any], task: str, rows: Rows) -> list[str]:
    """The losses on texts, and of each other task that was measured its first metric, where a row has it."""
    comparison = results["comparison"]
    asked = {**comparison.get("shared", {}), **comparison.get("tasks", {}).get(task, {})}.get("evaluation") or {}
    names = [name for name in rows[0]["metrics"] if any(is_finite(row["metrics"].get(name)) for row in rows)]
    texts = {f"{text} loss" for text in asked.get("texts") or {}}
    firsts: dict[str, str] = {}
    for name in names:
        owners = [task for task in asked.get("tasks") or {} if name.startswith(f"{task} ") and name not in texts]
        if owners:
            firsts.setdefault(max(owners, key=len), name)  # one task's name may begin with another's
    return [name for name in names if name.endswith(" loss") or name in firsts.values()]
