"""A model measured on a task: one row of the results."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel

from rankwise.files import write_bytes
from rankwise.peft_bridge import active_adapter
from rankwise.ranks import SoraConfig, gate_counts
from rankwise.recommend.cases import intervals
from rankwise.schema import Recipe
from rankwise.tasks.forgetting import HeldOut
from rankwise.tasks.task import Measurement, Task


def measured(
    task: Task,
    model: PeftModel,
    name: str,
    recipe: Recipe,
    cases: Path | None = None,
    *,
    base: bool = False,
    texts: HeldOut | None = None,
) -> dict[str, Any]:
    """A row of ``results.json``.

    Args:
        task: what to measure on.
        model: the base with its adapter, which is on, or off for the base's own row.
        name: of the row.
        recipe: says how many training rows to measure on too, and the seed that draws them.
        cases: as in :func:`measured_row`.
        base: whether the row is the base's own.
        texts: texts and tasks that are measured too.

    Returns:
        What :func:`measured_row` returns; ``training_metrics`` of ``training_cases`` training rows,
        where the recipe asks for them; and ``adapter``, what its gates leave (:func:`rankwise.ranks.gate_counts`),
        where it has gates.
    """
    row = measured_row(name, task.evaluate(model), task.cases, cases)
    if texts is not None:
        row["metrics"] = row["metrics"] | texts.measure(model)
    if limit := recipe.evaluation.training_cases:
        row["training_metrics"] = task.evaluate_training(model, limit, recipe.seed)
        row["training_cases"] = min(limit, len(task.sft_rows()))
    if not base and isinstance(model.peft_config[active_adapter(model)], SoraConfig):
        row["adapter"] = gate_counts(model)
    return row


def measured_row(name: str, found: Measurement, number: int, cases: Path | None = None) -> dict[str, Any]:
    """A row of ``results.json`` from a measurement.

    Args:
        name: of the row.
        found: what was measured.
        number: of held-out cases.
        cases: a folder that gets the measurement's cases, as ``<name>.parquet``, where it has some; None for nowhere.

    Returns:
        ``name``; ``metrics`` of ``cases`` held-out cases; and, where the cases are known one by one, the 95 % bootstrap
        ``intervals`` of those metrics that are means over them.
    """
    row: dict[str, Any] = {"name": name, "metrics": found.metrics, "cases": number}
    if found.cases is not None:
        row["intervals"] = intervals(found.cases)
        if cases is not None:
            buffer = io.BytesIO()
            found.cases.write_parquet(buffer)
            write_bytes(cases / f"{name}.parquet", buffer.getvalue())
    return row


def not_numbers(row: Mapping[str, Any]) -> dict[str, int]:
    """How many metrics of a row are NaN or infinite, as a count with a name; nothing where none is.

    They are written as ``null``.
    """
    values = [*row["metrics"].values(), *row.get("training_metrics", {}).values()]
    number = sum(not math.isfinite(value) for value in values)
    return {f"{row['name']}: measures that are no number": number} if number else {}


def row_line(row: Mapping[str, Any]) -> str:
    """A row in a line, for the console."""
    parts = [f"{row['name']}: {_metrics(row['metrics'])}"]
    if "training_metrics" in row:
        parts.append(f"on training rows: {_metrics(row['training_metrics'])}")
    if "adapter" in row:
        left = row["adapter"]
        parts.append(f"{left['gates_left']} of {left['gates']} gates left, {left['parameters_left']:,} parameters")
    return "; ".join(parts)


def _metrics(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
