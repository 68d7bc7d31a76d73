"""The history of a run's gates: how many are left, their parameters and threshold, and the ranks of each layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import plotly.graph_objects as go

from rankwise.analysis.drawing import COLORS, GRID, Metrics, axes, heatmap, is_finite, path, points
from rankwise.analysis.figures import by_stage
from rankwise.analysis.ranks import layer_names, split_module

NUMBERS = 12  # columns of a heat map in which numbers still fit
LETTERS = 60  # that fit side by side above a figure


class Span(NamedTuple):
    """A stage on the run's own count of steps: it begins after ``begin`` and ends with ``end``."""

    stage: str
    begin: int
    end: int


def run_steps(metrics: Metrics) -> tuple[list[Mapping[str, Any]], list[Span]]:
    """Log lines whose ``step`` goes on from stage to stage, and where each stage lies."""
    lines: list[Mapping[str, Any]] = []
    spans: list[Span] = []
    for stage, found in by_stage(metrics).items():
        stepped = [line for line in found if is_finite(line.get("step"))]
        begin = spans[-1].end if spans else 0
        lines += [{**line, "step": begin + line["step"]} for line in stepped]
        spans.append(Span(stage, begin, begin + max((int(line["step"]) for line in stepped), default=0)))
    return lines, spans


def gates_path(metrics: Metrics) -> go.Figure | None:
    """Gates left by step; ``None`` where no line tells them."""
    lines, spans = run_steps(metrics)
    left = points(lines, "gates_left")
    if not left:
        return None
    figure = go.Figure(layout=axes("Gates left", "step", "gates that are not zero"))
    figure.add_trace(path(left, "gates left", COLORS["gates"]))
    figure.update_layout(showlegend=False, yaxis={"rangemode": "tozero"})
    return _with_stages(figure, spans)


def parameters_path(metrics: Metrics) -> go.Figure | None:
    """Parameters of the directions left by step, with the budget where there is one; ``None`` where no line has them.

    The budget, ``parameters_target`` of the lines, is dashed.
    """
    lines, spans = run_steps(metrics)
    left, target = points(lines, "parameters_left"), points(lines, "parameters_target")
    if not left:
        return None
    figure = go.Figure(layout=axes("Parameters left", "step", "parameters"))
    figure.add_trace(path(left, "parameters left", COLORS["gates"]))
    if target:
        figure.add_trace(path(target, "target", COLORS["evaluation"], dash="dash"))
    legend = {"y": 0.98, "yanchor": "top"}  # inside: above are the names of stages
    figure.update_layout(showlegend=bool(target), legend=legend, yaxis={"rangemode": "tozero"})
    return _with_stages(figure, spans)


def threshold_path(metrics: Metrics) -> go.Figure | None:
    """The gates' threshold by step; ``None`` where it never changes, or no line has it."""
    lines, spans = run_steps(metrics)
    found = points(lines, "threshold")
    if len({value for _, value in found}) < 2:
        return None
    figure = go.Figure(layout=axes("Threshold", "step", "threshold of the gates"))
    figure.add_trace(path(found, "threshold", COLORS["training"], shape="hv"))
    figure.update_layout(showlegend=False, yaxis={"rangemode": "tozero", "exponentformat": "power"})
    return _with_stages(figure, spans)


def rank_history(metrics: Metrics) -> go.Figure | None:
    """Directions left in each layer, layers down, steps across; ``None`` where no line has ``ranks``.

    ``ranks`` of a line is a number for each adapted module; those of one layer are added up.
    """
    columns = {
        (stage, int(line["step"])): _by_layer(line["ranks"])
        for stage, lines in by_stage(metrics).items()
        for line in lines
        if isinstance(line.get("ranks"), Mapping) and is_finite(line.get("step"))
    }
    if not any(columns.values()):
        return None
    names = layer_names(layer for column in columns.values() for layer in column)
    rows = [[column.get(layer, 0) for column in columns.values()] for layer in names]
    labels = [f"{stage}, step {step}" for stage, step in columns]
    hover = "%{y}, %{x}: %{z} directions"
    figure = heatmap(labels, list(names.values()), rows, max(map(max, rows)), "Directions left by layer", hover)
    figure.update_xaxes(**_heads(list(columns)))
    if len(columns) > NUMBERS:
        figure.update_traces(texttemplate="", xgap=0)
    return figure


def _heads(columns: Sequence[tuple[str, int]]) -> dict[str, list[Any]]:
    """Ticks of a heat map: the steps of a single stage, or the name of each stage over its first column."""
    if len({stage for stage, _ in columns}) == 1:
        return {"tickvals": list(range(len(columns))), "ticktext": [str(step) for _, step in columns]}
    firsts: dict[str, int] = {}
    for at, (stage, _) in enumerate(columns):
        firsts.setdefault(stage, at)
    return {"tickvals": list(firsts.values()), "ticktext": list(map(escape, firsts))}


def _by_layer(ranks: Mapping[str, Any]) -> Counter[str]:
    found: Counter[str] = Counter()
    for module, rank in ranks.items():
        if is_finite(rank):
            found[split_module(str(module))[0]] += int(rank)
    return found


def _with_stages(figure: go.Figure, spans: Sequence[Span]) -> go.Figure:
    """Where there are several stages, a dotted line at each one's begin and, where there is room, its name above."""
    free, letter = 0.0, spans[-1].end / LETTERS
    for span in spans if len(spans) > 1 else ():
        if span.begin:
            figure.add_vline(x=span.begin, line={"color": GRID, "width": 1, "dash": "dot"})
        if span.begin >= free:
            free = span.begin + letter * (len(span.stage) + 1)
            name = {"text": escape(span.stage), "font": {"size": 11}, "xanchor": "left", "yanchor": "bottom"}
            figure.add_annotation(x=span.begin, y=1, yref="paper", showarrow=False, **name)
    return figure


def histories(metrics: Metrics) -> list[go.Figure]:
    """The figures above, as many as the log lines allow."""
    found = (gates_path(metrics), parameters_path(metrics), threshold_path(metrics), rank_history(metrics))
    return [figure for figure in found if figure is not None]
