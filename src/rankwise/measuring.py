"""A model measured on a task: one row of the results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftModel

from rankwise.peft_bridge import active_adapter
from rankwise.ranks import SoraConfig, gate_counts
from rankwise.schema import Recipe
from rankwise.tasks.task import Task


def measured(task: Task, model: PeftModel, name: str, recipe: Recipe, *, base: bool = False) -> dict[str, Any]:
    """A row of ``results.json``.

    Args:
        task: what to measure on.
        model: the base with its adapter, which is on, or off for the base's own row.
        name: of the row.
        recipe: says how many training rows to measure on too, and the seed that draws them.
        base: whether the row is the base's own.

    Returns:
        ``name``; ``metrics`` of ``cases`` held-out cases; ``training_metrics`` of ``training_cases`` training rows,
        where the recipe asks for them; and ``adapter``, what its gates leave (:func:`rankwise.ranks.gate_counts`),
        where it has gates.
    """
    row: dict[str, Any] = {"name": name, "metrics": task.evaluate(model), "cases": task.cases}
    if limit := recipe.evaluation.training_cases:
        row["training_metrics"] = task.evaluate_training(model, limit, recipe.seed)
        row["training_cases"] = min(limit, len(task.sft_rows()))
    if not base and isinstance(model.peft_config[active_adapter(model)], SoraConfig):
        row["adapter"] = gate_counts(model)
    return row


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
