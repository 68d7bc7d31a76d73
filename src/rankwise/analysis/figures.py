"""Figures of a run: learning curves, and ranks by layer and kind of module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from rankwise.analysis.drawing import COLORS, Metrics, apart, axes, heatmap, path, points, scatter
from rankwise.analysis.ranks import rank_grid


def by_stage(metrics: Metrics) -> dict[str, list[Mapping[str, Any]]]:
    """Log lines of each stage, stages in the order in which they first occur."""
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for line in metrics:
        stages.setdefault(str(line.get("stage", "training")), []).append(line)
    return stages


def loss_label(kind: str, task: str | None) -> str:
    """Name and unit of the loss of a kind of stage: preferences are per row, language models per token."""
    if "dpo" in kind.lower():
        return "loss (nats per row)"
    return "loss" if task in (None, "classification") else "loss (nats per token)"


def learning_curve(stage: str, lines: Metrics, task: str | None = None, kind: str | None = None) -> go.Figure | None:
    """Loss of one stage by step, training a line, evaluation markers; ``None`` where no line has a loss."""
    training, evaluation = points(lines, "loss"), points(lines, "eval_loss")
    if not training and not evaluation:
        return None
    figure = go.Figure(layout=axes(f"Loss, stage {stage}", "step", loss_label(kind or stage, task)))
    if training:
        figure.add_trace(path(training, "training", COLORS["training"]))
    if evaluation:
        x, y = apart(evaluation)
        marker = {"color": COLORS["evaluation"], "size": 9, "symbol": "diamond"}
        line = {"color": COLORS["evaluation"], "width": 1, "dash": "dot"}
        figure.add_trace(scatter(x, y, "evaluation", mode="lines+markers", marker=marker, line=line))
    return figure


def rank_heatmap(rows: Metrics) -> go.Figure | None:
    """Rank of each module, layers from the first downwards, kinds of module across; ``None`` without rows."""
    if not rows:
        return None
    grid = rank_grid(rows)
    top = max(max(int(row["rank"]), int(row.get("initial_rank") or 0)) for row in rows)
    title, hover = "Rank by layer and kind of module", "%{y}, %{x}: rank %{z}"
    return heatmap(grid.kinds, grid.layers, grid.ranks, top, title, hover)


def curves(metrics: Metrics, task: str | None = None, kinds: Mapping[str, str] | None = None) -> list[go.Figure]:
    """Every stage's learning curve.

    Args:
        metrics: log lines.
        task: kind of the data, which tells the unit of the loss.
        kinds: kinds of the stages by name; a stage that is not in it is of the kind that its name says.
    """
    stages = by_stage(metrics).items()
    found = [learning_curve(stage, lines, task, (kinds or {}).get(stage)) for stage, lines in stages]
    return [figure for figure in found if figure is not None]
