"""A comparison's figures: every run as a row of Parquet, and each method on each task as a row of a summary."""

from __future__ import annotations

import io
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from rankwise.comparing.cells import CELLS, Cell, Setting
from rankwise.comparing.choosing import Key, deciding_metric, final_row
from rankwise.comparing.statistics import holm, paired, spread
from rankwise.errors import UserError
from rankwise.files import temporary_folder, write_bytes
from rankwise.reading import is_file_name, read_parquet
from rankwise.recipes import dump_recipe
from rankwise.schema import METHODS, Comparison

RUNS = "runs.parquet"
ANOTHER = "remove it, or give another output"  # where it is no such file


def run_rows(comparison: Comparison, cells: Iterable[Cell]) -> list[dict[str, Any]]:
    """A row for each finished run."""
    rows = []
    for cell in cells:
        result = cell.result()
        if result is None:
            continue
        row = final_row(result)
        metric = deciding_metric(comparison, cell.task, result["columns"]) if row else None
        value = row["metrics"].get(metric) if row else None
        scored = value is not None and math.isfinite(value)
        rows.append(
            {
                "task": cell.task,
                "method": cell.method,
                "part": cell.part,
                "learning_rate": cell.setting.learning_rate,
                "rank": cell.setting.rank,
                "budget": cell.setting.budget,
                "seed": cell.seed,
                "share": cell.share,
                "metric": metric,
                "value": value if scored else None,
                "metrics": row["metrics"] if row else {},
                "base": _metrics_of(result, "base model"),
                "frequent": _metrics_of(result, "most frequent"),
                "updates": result.get("updates") or {},
                "drift": result.get("drift") or {},
                "cases": (row or {}).get("cases"),
                "training": (row or {}).get("training_metrics") or {},
                "curve": result.get("curve") or [],
                "ranks": result.get("ranks") or {},
                "versions": result.get("versions") or {},
                "parameters": result.get("parameters"),
                "parameters_left": ((row or {}).get("adapter") or {}).get("parameters_left"),
                "step_seconds": result.get("step_seconds"),
                "seconds": result.get("seconds"),
                "peak_memory": result.get("peak_memory"),
                "failed": result.get("failed") or (None if scored else f"{metric} of seed {cell.seed} is no number"),
                "run": cell.folder.name,
                "recipe": dump_recipe(cell.recipe),
                "result": json.dumps(result, ensure_ascii=False),  # to the letter: it has a digest
            }
        )
    return rows


def _metrics_of(result: Mapping[str, Any], name: str) -> dict[str, float]:
    """Of a row beside the trained stages, where the cell measured it."""
    found = [row["metrics"] for row in result.get("rows") or [] if row["name"] == name]
    return found[0] if found else {}


def write_runs(folder: Path, rows: Sequence[Mapping[str, Any]], earlier: pl.DataFrame | None = None) -> None:
    """All runs as Parquet, a row each; metrics as columns ``metric: <name>``, where updates lie as ``updates: <name>``.

    Metrics on training rows are ``training: <name>``; CKA of the last layer's hidden states with those of the base is
    in ``drift: <rows>``.

    ``recipe`` (YAML) and ``result`` (JSON) are all that a cell consists of: see :func:`restore`. Runs of an ``earlier``
    file that are not among the rows stay: so nothing is lost while a comparison comes to them. No file for no runs.
    """
    nested = ("metrics", "updates", "drift", "base", "frequent", "training", "curve", "ranks", "versions")
    flat = [{key: value for key, value in row.items() if key not in nested} for row in rows]
    last = [{name: [*layers.values()][-1] for name, layers in row["drift"].items()} for row in rows]
    wide = {name: [row[name] for row in rows] for name in ("training", "updates")}
    wide |= {"metric": [row["metrics"] for row in rows], "drift": last}
    for column, found in wide.items():
        names = sorted({name for one in found for name in one})
        for values, one in zip(flat, found, strict=True):
            values |= {f"{column}: {name}": one.get(name) for name in names}
    buffer = io.BytesIO()
    table = pl.DataFrame(flat, infer_schema_length=None)
    if earlier is not None:
        others = earlier.filter(~pl.col("run").is_in([row["run"] for row in rows]))
        table = pl.concat([table, others], how="diagonal_relaxed")
    if not table.is_empty():
        table.write_parquet(buffer)
        write_bytes(folder / RUNS, buffer.getvalue())


def earlier_runs(folder: Path) -> pl.DataFrame | None:
    """The runs that :func:`write_runs` wrote before, if it did.

    Raises:
        UserError: the file is none that a comparison wrote.
    """
    path = folder / RUNS
    if not path.is_file():
        return None
    found: pl.DataFrame = read_parquet(path, ANOTHER)
    if found.is_empty():  # as a comparison of an earlier version left it that was broken off
        return None
    if found.schema.get("run") != pl.String:
        raise UserError(f"{path} holds no runs of a comparison: {ANOTHER}")
    return found


def restore(folder: Path) -> int:
    """Write out the cells of ``runs.parquet`` where the comparison's folder has none: they are not run again.

    Returns:
        How many there were.

    Raises:
        UserError: the file is none that a comparison wrote.
    """
    path = folder / RUNS
    if (folder / CELLS).is_dir() or not path.is_file():
        return 0
    kept = read_parquet(path, ANOTHER, ["run", "recipe", "result"])
    if set(kept.dtypes) != {pl.String} or sum(kept.null_count().row(0)):
        raise UserError(f"{path} holds no runs of a comparison: {ANOTHER}")
    if stray := [name for name in kept["run"] if not is_file_name(name)]:
        raise UserError(f"{path}: run {stray[0]!r} is no file name: {ANOTHER}")
    try:
        with temporary_folder(folder / CELLS) as made:
            for name, recipe, result in kept.iter_rows():
                (made / f"{name}.yaml").write_text(recipe, encoding="utf-8")
                (made / f"{name}.json").write_text(result, encoding="utf-8")
            made.rename(folder / CELLS)
    except OSError:
        if not (folder / CELLS).is_dir():  # where it is, another command was first
            raise
    return len(kept)


def summarise(
    comparison: Comparison, rows: Sequence[Mapping[str, Any]], chosen: Mapping[Key, Setting]
) -> list[dict[str, Any]]:
    """A row for each task and method, over the seeds: score, cost, and the difference from the baseline.

    Returns:
        ``task``, ``method``, ``title``, ``paper``, the chosen ``learning_rate``, ``rank`` and ``budget``, and
        ``undecided``, why the search did not choose them, if so; ``metric`` with ``mean``, ``deviation``, ``low``,
        ``high`` and ``values`` by seed, which lack those that failed, over ``cases`` (None where seeds differ in it);
        ``difference`` from the baseline with its interval, the paired t-test's ``p`` and ``p_holm`` over the task's
        methods (None with one seed, and where the difference is the same at each);
        ``parameters``, ``step_seconds`` (median), ``peak_memory`` (largest); means of all ``metrics``, of
        ``updates``, where these lie, of ``drift``, by rows and layer, of metrics on ``training`` rows, and, where all
        runs kept them, of the learning ``curve`` and of ``ranks`` by layer; ``failed``, the first mistake of a run;
        and the names of its ``cells``, by seed.
    """
    found = []
    for task in comparison.tasks:
        by_method = {entry.name: _of(rows, task, entry.name) for entry in comparison.methods}
        baseline = _by_seed(by_method[comparison.baseline])
        made = []
        for entry in comparison.methods:
            own, setting = by_method[entry.name], chosen[task, entry.name]
            made.append(
                {
                    "task": task,
                    "method": entry.name,
                    "title": METHODS[entry.kind].title,
                    "paper": METHODS[entry.kind].paper,
                    "learning_rate": setting.learning_rate,
                    "rank": setting.rank,
                    "budget": setting.budget,
                    "undecided": _undecided(_of(rows, task, entry.name, "search"), setting),
                    **_scores(own),
                    **_difference(own, baseline, entry.name == comparison.baseline),
                    **_cost(own),
                    "updates": means(row["updates"] for row in own),
                    "drift": _drift([row["drift"] for row in own]),
                    "training": means(row["training"] for row in own),
                    "curve": _curve(_of_all(own, "curve")),
                    "ranks": means(_of_all(own, "ranks")),
                    "failed": next((row["failed"] for row in own if row["failed"]), None),
                    "cells": {row["seed"]: row["run"] for row in own},
                }
            )
        for row, p in zip(made, holm([row["p"] for row in made]), strict=True):
            row["p_holm"] = p
        found += [{name: _known(value) for name, value in row.items()} for row in made]
    return found


def _known(value: Any) -> Any:
    """None for NaN, which JSON has not."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _of(rows: Sequence[Mapping[str, Any]], task: str, method: str, part: str = "final") -> list[Mapping[str, Any]]:
    return [row for row in rows if (row["task"], row["method"], row["part"]) == (task, method, part)]


def _undecided(rows: Sequence[Mapping[str, Any]], chosen: Setting) -> str | None:
    """Why the runs of a method's search did not choose its setting; None where they did, or there are none.

    A setting is equal to the chosen one where it had the same scores, means over the seeds, as long as it was in the
    search.
    """
    if not rows:
        return None
    scores = _mean_scores(rows)
    if failed := [row["failed"] for row in rows if row["value"] is None]:
        if len(failed) == len(rows):
            return f"every run failed: {failed[0]}"
        if all(math.isinf(value) for one in scores.values() for value in one.values()):
            return f"each setting had a run that failed: {failed[0]}"
    equal = [one for one in scores.values() if one.items() <= scores[chosen].items()]
    return f"{len(equal)} of {len(scores)} had the same score" if len(equal) > 1 else None


def _mean_scores(rows: Sequence[Mapping[str, Any]]) -> dict[Setting, dict[float, float]]:
    """Of each setting, by the share of the epochs, the mean over the seeds; -inf where one of them failed."""
    found: dict[Setting, dict[float, list[float]]] = {}
    for row in rows:
        setting = Setting(row["learning_rate"], row["rank"], row["budget"])
        value = -math.inf if row["value"] is None else row["value"]
        found.setdefault(setting, {}).setdefault(row["share"], []).append(value)
    return {setting: {share: statistics.fmean(some) for share, some in one.items()} for setting, one in found.items()}


def _by_seed(rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    return {row["seed"]: row["value"] for row in rows if row["value"] is not None}


def _scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    values = _by_seed(rows)
    if not values:
        none = dict.fromkeys(("metric", "mean", "deviation", "low", "high", "cases"))
        return {**none, "values": {}, "metrics": {}}
    scored = [row for row in rows if row["value"] is not None]
    cases = {row["cases"] for row in scored}
    return {
        "metric": scored[0]["metric"],
        "values": values,
        "cases": cases.pop() if len(cases) == 1 else None,
        "metrics": means(row["metrics"] for row in scored),
        **spread(list(values.values()))._asdict(),
    }


def _difference(rows: Sequence[Mapping[str, Any]], baseline: Mapping[int, float], is_baseline: bool) -> dict[str, Any]:
    found = None if is_baseline else paired(_by_seed(rows), baseline)
    if found is None:
        return {"difference": None, "difference_low": None, "difference_high": None, "p": math.nan}
    ends = {"difference_low": found.low, "difference_high": found.high}
    return {"difference": found.mean, **ends, "p": found.p}


def _cost(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    steps = [row["step_seconds"] for row in rows if row["step_seconds"]]
    memory = [row["peak_memory"] for row in rows if row["peak_memory"] and not row["failed"]]
    return {
        "parameters": next((row["parameters"] for row in rows if row["parameters"] is not None), None),
        "parameters_left": _mean(row["parameters_left"] for row in rows),
        "step_seconds": statistics.median(steps) if steps else None,
        "peak_memory": max(memory) if memory else None,
    }


def _drift(found: Sequence[Mapping[str, Mapping[str, float | None]]]) -> dict[str, dict[str, float | None]]:
    names = dict.fromkeys(name for one in found for name in one)
    return {name: means(one[name] for one in found if name in one) for name in names}


def _of_all(rows: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    """What each run kept under a name; nothing where one did not, as it is of an earlier version."""
    found = [row[name] for row in rows if not row["failed"]]
    return found if all(found) else []


def _curve(curves: Sequence[Sequence[Sequence[float | int]]]) -> list[list[float | int]]:
    """The mean over runs at the steps of the shortest; between a run's own steps on straight lines."""
    if not curves:
        return []
    apart = [tuple(zip(*curve, strict=True)) for curve in curves]
    at = min((steps for steps, _ in apart), key=lambda steps: (steps[-1], len(steps)))
    losses = np.mean([np.interp(at, steps, values) for steps, values in apart], axis=0)
    return [[step, float(loss)] for step, loss in zip(at, losses, strict=True)]


def means(found: Iterable[Mapping[str, float | int | None]]) -> dict[str, float | None]:
    """Of each name, over those that have it and are not None."""
    rows = list(found)
    return {name: _mean(row.get(name) for row in rows) for name in dict.fromkeys(name for row in rows for name in row)}


def _mean(values: Iterable[float | int | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
