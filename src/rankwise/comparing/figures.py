"""Figures of a comparison: scores with their intervals, scores against cost and forgetting, and the search."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import plotly.graph_objects as go

from rankwise.analysis.columns import is_lower_better
from rankwise.analysis.drawing import COLORS, axes, is_finite, many_lines, numbered_line
from rankwise.comparing.labels import label_places

Rows = Sequence[Mapping[str, Any]]


def score_figure(rows: Rows, metric: str) -> go.Figure:
    """Each method's mean with its 95 % interval, and a dot for each seed; the first row on top."""
    ordered = rows[::-1]
    names = [row["method"] for row in ordered]
    figure = go.Figure(layout=axes("Scores", f"{metric}, mean with its 95 % interval", ""))
    seeds = [(value, row["method"]) for row in ordered for value in row["values"].values()]
    figure.add_trace(
        go.Scatter(
            x=[value for value, _ in seeds],
            y=[name for _, name in seeds],
            name="a seed",
            mode="markers",
            marker={"color": COLORS["text"], "size": 6, "opacity": 0.6},
            hovertemplate="%{y}: %{x:.4~g}<extra></extra>",
        )
    )
    ends = [row["high"] - row["mean"] if is_finite(row["high"]) else 0.0 for row in ordered]
    figure.add_trace(
        go.Scatter(
            x=[row["mean"] for row in ordered],
            y=names,
            name="mean",
            mode="markers",
            marker={"color": COLORS["training"], "size": 9},
            error_x={"type": "data", "array": ends, "color": COLORS["training"], "thickness": 2, "width": 5},
            hovertemplate="%{y}: %{x:.4~g}<extra></extra>",
        )
    )
    figure.update_yaxes(type="category", ticklabelstandoff=8, automargin=True)
    figure.update_xaxes(showgrid=True)
    figure.update_layout(height=max(220, 110 + 26 * len(names)), hovermode="closest", margin={"l": 12})
    return figure


def cost_figure(rows: Rows, metric: str) -> go.Figure:
    """Score against trained parameters, on a log scale."""
    figure = labelled(rows, [row["parameters"] for row in rows], metric, f"{metric} by trained parameters", log=True)
    figure.update_xaxes(title={"text": "trained parameters (log scale)"}, showgrid=True)
    return figure


def forgetting_figure(rows: Rows, metric: str, text: str, base: float) -> go.Figure:
    """Score against what was forgotten: what the loss on a text rose by, in nats a token, or a task's score fell by.

    A line joins what no other method beats in both.

    Args:
        rows: of the methods.
        metric: that decides.
        text: name of the metric of the text or task.
        base: its value before training.
    """
    known = [row for row in rows if is_finite(row["metrics"].get(text))]
    rises = [forgotten(row, text, base) for row in known]
    name = text.removesuffix(" loss")
    figure = labelled(known, rises, metric, f"What was learnt, and what was forgotten of {name}")
    front = unbeaten(known, metric, text, base)
    figure.add_trace(
        go.Scatter(
            x=[forgotten(row, text, base) for row in front],
            y=[row["mean"] for row in front],
            name="not beaten in both",
            mode="lines",
            line={"color": COLORS["evaluation"], "width": 1.5, "dash": "dot"},
            hoverinfo="skip",
        )
    )
    axis = f"rise of the loss on {name}, nats a token" if text.endswith(" loss") else f"fall of {name}"
    figure.update_xaxes(title={"text": f"{axis} (less is better)"}, showgrid=True)
    return figure


def forgotten(row: Mapping[str, Any], name: str, base: float) -> float:
    """How much worse a metric is than before training."""
    change: float = row["metrics"][name] - base
    return change if is_lower_better(name) else -change


def unbeaten(rows: Rows, metric: str, name: str, base: float) -> list[Mapping[str, Any]]:
    """The rows that no other one is at least as good as in score and forgetting, and better in one; least forgot first.

    Args:
        rows: of the methods.
        metric: that decides.
        name: of the metric of the text or task; rows without it are left out.
        base: its value before training.
    """
    sign = 1.0 if is_lower_better(metric) else -1.0
    known = [row for row in rows if is_finite(row["metrics"].get(name))]
    both = [(forgotten(row, name, base), sign * row["mean"]) for row in known]
    front = [
        (costs, number)
        for number, costs in enumerate(both)
        if not any(other != costs and other[0] <= costs[0] and other[1] <= costs[1] for other in both)
    ]
    return [known[number] for _, number in sorted(front)]


def labelled(
    rows: Rows, x: Sequence[float | int], upright: str, title: str, y: Sequence[float] | None = None, log: bool = False
) -> go.Figure:
    """A point for each method with its name beside it.

    Args:
        rows: of the methods.
        x: of each row.
        upright: title of the upright axis.
        title: of the figure.
        y: of each row; its mean where None.
        log: whether x is on a log scale.
    """
    heights, names = [row["mean"] for row in rows] if y is None else list(y), [row["method"] for row in rows]
    across = [math.log(value) if log and value > 0 else float(value) for value in x]
    figure = go.Figure(layout=axes(title, "", upright))
    figure.add_trace(
        go.Scatter(
            x=list(x),
            y=heights,
            text=names,
            name="a method",
            mode="markers+text",
            textposition=label_places(list(zip(across, heights, strict=True)), names),
            textfont={"size": 11},
            marker={"color": COLORS["training"], "size": 9},
            hovertemplate=f"%{{text}}: %{{y:.4~g}} at %{{x:.4~{'s' if log else 'g'}}}<extra></extra>",
            cliponaxis=False,
        )
    )
    if log:
        figure.update_xaxes(type="log")
    figure.update_layout(hovermode="closest", showlegend=False, height=360)
    return figure


def search_figure(search: Rows, metric: str) -> go.Figure | None:
    """The first round's scores on held-out data by learning rate, a line a method; None where nothing was searched.

    Means over the seeds of the search; of the ranks and budgets tried at a rate, the best.
    """
    if not search:
        return None
    first = min(row["share"] for row in search)
    figure = go.Figure(layout=axes("Learning rates", "learning rate (log scale)", f"{metric} on held-out data"))
    names = list(dict.fromkeys(row["method"] for row in search))
    for number, name in enumerate(names):
        tried: dict[tuple[float, ...], list[float]] = {}
        for row in search:
            if row["method"] == name and row["share"] == first:
                tried.setdefault((row["learning_rate"], row["rank"], row["budget"]), []).append(row["value"])
        best: dict[float, float] = {}
        for (rate, *_), values in tried.items():
            if all(map(is_finite, values)):
                choose = min if is_lower_better(metric) else max
                best[rate] = choose(best.get(rate, fmean(values)), fmean(values))
        rates = sorted(best)
        line = {"width": 2, **numbered_line(number)}
        figure.add_trace(
            go.Scatter(
                x=rates,
                y=[best[rate] for rate in rates],
                name=name,
                mode="lines+markers",
                line=line,
                hovertemplate="%{y:.4~g}",
            )
        )
    rates = sorted({row["learning_rate"] for row in search})
    ticks = {"tickvals": rates, "ticktext": [f"{rate:g}" for rate in rates], "automargin": True}
    figure.update_xaxes(type="log", showgrid=True, **ticks)
    return many_lines(figure)
