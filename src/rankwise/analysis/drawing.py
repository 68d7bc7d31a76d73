"""What the figures of a page share: colours, axes, lines, and a sentence for readers who do not see them.

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

# Each has a contrast of 3:1 or more against a white and against a near-black page.
COLORS = {"training": "#2f81d6", "evaluation": "#d9601a", "gates": "#8f6bd1", "text": "#7a828c"}
LINES = ("#2f81d6", "#d9601a", "#8f6bd1", "#2a9d6f", "#c2417c", "#9a7b1c", "#5b7f95", "#b4553b")
DASHES = ("solid", "dash", "dot")  # for more lines than colours
# Opacity, not lightness, tells the rank: little ink is little rank on either page, and the text of the page
# keeps a contrast of 4.5:1 on every cell.
RANK_SCALE = [[0.0, "rgba(47, 129, 214, 0.08)"], [1.0, "rgba(47, 129, 214, 0.75)"]]
GRID = "rgba(128, 136, 148, 0.25)"
_FONT = {
    "family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif",
    "size": 13,
    "color": COLORS["text"],
}
Metrics = Sequence[Mapping[str, Any]]


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


def summary(figure: go.Figure) -> str:
    """A sentence for readers who do not see the figure: where lines start, end and are lowest, or sums of columns."""
    return "; ".join({"scatter": _trace_summary, "heatmap": _cells_summary}[trace.type](trace) for trace in figure.data)


def _cells_summary(trace: Any) -> str:
    first, last = (sum(row[at] or 0 for row in trace.z) for at in (0, -1))
    return f"{short(first)} in all at {trace.x[0]}, {short(last)} at {trace.x[-1]}"


def _trace_summary(trace: Any) -> str:
    steps, values = list(trace.x), list(trace.y)
    if len(values) == 1:
        return f"{trace.name} {short(values[0])} at step {steps[0]}"
    low = min(values)
    text = f"{trace.name} {short(values[0])} at step {steps[0]}, {short(values[-1])} at step {steps[-1]}"
    return text if low in (values[0], values[-1]) else f"{text}, lowest {short(low)} at step {steps[values.index(low)]}"


def short(value: Number) -> str:
    """A number as it is written in a sentence."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def path(values: Sequence[tuple[Number, Number]], name: str, color: str, **style: Any) -> go.Scatter:
    """A line through (step, value) pairs; ``style`` is of the line: its dash, its shape."""
    x, y = apart(values)
    # One point makes no line: without a marker it would be invisible.
    mode = "lines" if len(x) > 1 else "markers"
    line = {"color": color, "width": 2} | style
    return scatter(x, y, name, mode=mode, line=line, marker={"color": color, "size": 8})


def numbered_line(number: int) -> dict[str, str]:
    """Colour and dash of one of many lines."""
    return {"color": LINES[number % len(LINES)], "dash": DASHES[number // len(LINES) % len(DASHES)]}


def many_lines(figure: go.Figure) -> go.Figure:
    """The figure with room for the names of its lines below it."""
    legend = {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.2, "yanchor": "top"}
    figure.update_layout(legend=legend, height=380 + 8 * len(figure.data))
    return figure


def apart(values: Sequence[tuple[Number, Number]]) -> tuple[list[Number], list[Number]]:
    """Steps and values apart; a step that was logged twice counts as it was logged last."""
    last = [list(same)[-1] for _, same in groupby(values, key=lambda pair: pair[0])]
    return [step for step, _ in last], [value for _, value in last]


def scatter(x: Sequence[Number | str], y: Sequence[Number], name: str, **style: Any) -> go.Scatter:
    """A trace that tells its value to four digits."""
    return go.Scatter(x=x, y=y, name=name, **{"hovertemplate": "%{y:.4~g}"} | style)


LETTERS = 110  # that fit side by side above a heat map


def heatmap(
    x: Sequence[str], y: Sequence[str], z: Sequence[Sequence[int | None]], top: int, title: str, hover: str
) -> go.Figure:
    """Counts by two kinds of names, ``y`` from the first downwards, on a scale from 0 to ``top``."""
    cells = go.Heatmap(
        x=x,
        y=y,
        z=z,
        zmin=0,
        zmax=max(top, 1),
        colorscale=RANK_SCALE,
        showscale=False,
        xgap=2,
        ygap=2,
        texttemplate="%{z}",
        hovertemplate=f"{hover}<extra></extra>",
        hoverongaps=False,
    )
    figure = go.Figure(cells, axes(title, "", ""))
    figure.update_xaxes(type="category", side="top", ticklabelstandoff=4, showgrid=False, ticks="", automargin=True)
    figure.update_yaxes(
        type="category", autorange="reversed", ticklabelstandoff=8, showgrid=False, ticks="", automargin=True
    )
    longest = max(map(len, x))
    head = 60 + (4 * longest if longest * len(x) > LETTERS else 0)  # names that do not fit are turned, and stand higher
    figure.update_layout(height=max(160, head + 26 * len(y)), hovermode="closest", margin={"l": 12, "t": 24, "b": 12})
    return figure


def axes(title: str, x: str, y: str) -> go.Layout:
    """An empty figure with these titles, with room for numbers of eight characters beside its axes.

    An axis of names needs ``automargin``; for all it would draw each figure several times to find its margins.
    """
    axis = {"gridcolor": GRID, "zeroline": False}
    return go.Layout(
        template="none",
        title={"text": title, "x": 0, "xref": "paper", "font": {"size": 15}},
        font=_FONT,
        height=320,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 72, "r": 20, "t": 48, "b": 48},
        xaxis=axis
        | {
            "title": {"text": x, "standoff": 10, "font": {"size": 13}},
            "showgrid": False,
            "ticks": "outside",
            "tickcolor": GRID,
        },
        yaxis=axis | {"title": {"text": y, "standoff": 10, "font": {"size": 13}}},
        hovermode="x unified",
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
    )
