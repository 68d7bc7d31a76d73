"""Figures of a run: learning curves, the path of the gates, ranks by layer and kind of module.

Backgrounds are transparent and colours hold on a light and on a dark page; a page may recolour text and
grid with CSS.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, TypeGuard

import plotly.graph_objects as go

from rankwise.analysis.columns import Number
from rankwise.analysis.ranks import rank_grid

# Each has a contrast of 3:1 or more against a white and against a near-black page.
COLORS = {"training": "#2f81d6", "evaluation": "#d9601a", "gates": "#8f6bd1", "text": "#7a828c"}
# Opacity, not lightness, tells the rank: little ink is little rank on either page, and the text of the page
# keeps a contrast of 4.5:1 on every cell.
RANK_SCALE = [[0.0, "rgba(47, 129, 214, 0.08)"], [1.0, "rgba(47, 129, 214, 0.75)"]]
_GRID = "rgba(128, 136, 148, 0.25)"
_FONT = {
    "family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif",
    "size": 13,
    "color": COLORS["text"],
}
Metrics = Sequence[Mapping[str, Any]]


def by_stage(metrics: Metrics) -> dict[str, list[Mapping[str, Any]]]:
    """Log lines of each stage, stages in the order in which they first occur."""
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for line in metrics:
        stages.setdefault(str(line.get("stage", "training")), []).append(line)
    return stages


def points(lines: Metrics, key: str) -> list[tuple[Number, Number]]:
    """(step, value) of the lines that have both as finite numbers, in order of step."""
    pairs = [(line.get("step"), line.get(key)) for line in lines]
    return sorted((step, value) for step, value in pairs if is_finite(step) and is_finite(value))


def not_finite(lines: Metrics, key: str) -> int:
    """How many of the lines have a value for ``key`` that is not finite and so cannot be drawn."""
    return sum(key in line and not is_finite(line[key]) for line in lines)


def is_finite(value: Any) -> TypeGuard[Number]:
    """Whether a logged value is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


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
    figure = go.Figure(layout=_layout(f"Loss, stage {stage}", "step", loss_label(kind or stage, task)))
    if training:
        figure.add_trace(_line(training, "training", COLORS["training"]))
    if evaluation:
        x, y = _columns(evaluation)
        marker = {"color": COLORS["evaluation"], "size": 9, "symbol": "diamond"}
        line = {"color": COLORS["evaluation"], "width": 1, "dash": "dot"}
        figure.add_trace(_scatter(x, y, "evaluation", mode="lines+markers", marker=marker, line=line))
    return figure


def gates_path(stage: str, lines: Metrics) -> go.Figure | None:
    """Gates left by step of one stage; ``None`` where no line tells them."""
    left = points(lines, "gates_left")
    if not left:
        return None
    figure = go.Figure(layout=_layout(f"Gates left, stage {stage}", "step", "gates that are not zero"))
    figure.add_trace(_line(left, "gates left", COLORS["gates"]))
    figure.update_layout(showlegend=False, yaxis={"rangemode": "tozero"})
    return figure


def rank_heatmap(rows: Metrics) -> go.Figure | None:
    """Rank of each module, layers from the first downwards, kinds of module across; ``None`` without rows."""
    if not rows:
        return None
    grid = rank_grid(rows)
    top = max(max(int(row["rank"]), int(row.get("initial_rank") or 0)) for row in rows)
    heatmap = go.Heatmap(
        x=grid.kinds,
        y=grid.layers,
        z=grid.ranks,
        zmin=0,
        zmax=max(top, 1),
        colorscale=RANK_SCALE,
        showscale=False,
        xgap=2,
        ygap=2,
        texttemplate="%{z}",
        hovertemplate="%{y}, %{x}: rank %{z}<extra></extra>",
        hoverongaps=False,
    )
    figure = go.Figure(heatmap, _layout("Rank by layer and kind of module", "", ""))
    figure.update_xaxes(type="category", side="top", ticklabelstandoff=4, showgrid=False, ticks="", automargin=True)
    figure.update_yaxes(
        type="category", autorange="reversed", ticklabelstandoff=8, showgrid=False, ticks="", automargin=True
    )
    figure.update_layout(height=max(160, 60 + 26 * len(grid.layers)), hovermode="closest", margin={"t": 24, "b": 12})
    return figure


def curves(metrics: Metrics, task: str | None = None, kinds: Mapping[str, str] | None = None) -> list[go.Figure]:
    """Every stage's learning curve, each followed by the path of its gates where there is one.

    Args:
        metrics: log lines.
        task: kind of the data, which tells the unit of the loss.
        kinds: kinds of the stages by name; a stage that is not in it is of the kind that its name says.
    """
    found = [
        figure
        for stage, lines in by_stage(metrics).items()
        for figure in (learning_curve(stage, lines, task, (kinds or {}).get(stage)), gates_path(stage, lines))
    ]
    return [figure for figure in found if figure is not None]


def summary(figure: go.Figure) -> str:
    """A sentence for readers who do not see the figure: where each line starts, ends, and is lowest."""
    return "; ".join(_trace_summary(trace) for trace in figure.data if trace.type == "scatter")


def _trace_summary(trace: Any) -> str:
    steps, values = list(trace.x), list(trace.y)
    if len(values) == 1:
        return f"{trace.name} {_short(values[0])} at step {steps[0]}"
    low = min(values)
    text = f"{trace.name} {_short(values[0])} at step {steps[0]}, {_short(values[-1])} at step {steps[-1]}"
    return text if low == values[-1] else f"{text}, lowest {_short(low)} at step {steps[values.index(low)]}"


def _short(value: Number) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _line(values: Sequence[tuple[Number, Number]], name: str, color: str) -> go.Scatter:
    x, y = _columns(values)
    # One point makes no line: without a marker it would be invisible.
    mode = "lines" if len(x) > 1 else "markers"
    return _scatter(x, y, name, mode=mode, line={"color": color, "width": 2}, marker={"color": color, "size": 8})


def _columns(values: Sequence[tuple[Number, Number]]) -> tuple[list[Number], list[Number]]:
    """Steps and values apart; a step that was logged twice counts as it was logged last."""
    last = [list(same)[-1] for _, same in groupby(values, key=lambda pair: pair[0])]
    return [step for step, _ in last], [value for _, value in last]


def _scatter(x: list[Number], y: list[Number], name: str, **style: Any) -> go.Scatter:
    return go.Scatter(x=x, y=y, name=name, hovertemplate="%{y:.4~g}", **style)


def _layout(title: str, x: str, y: str) -> go.Layout:
    axis = {"gridcolor": _GRID, "zeroline": False, "automargin": True}
    return go.Layout(
        template="none",
        title={"text": title, "x": 0, "xref": "paper", "font": {"size": 15}},
        font=_FONT,
        height=320,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 12, "r": 20, "t": 48, "b": 12},
        xaxis=axis
        | {
            "title": {"text": x, "standoff": 10, "font": {"size": 13}},
            "showgrid": False,
            "ticks": "outside",
            "tickcolor": _GRID,
        },
        yaxis=axis | {"title": {"text": y, "standoff": 10, "font": {"size": 13}}},
        hovermode="x unified",
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
    )
