"""How the methods of a comparison were trained: their losses by step, what they memorised, and the ranks they have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from rankwise.analysis.columns import is_lower_better
from rankwise.analysis.drawing import axes, heatmap, is_finite, many_lines, numbered_line, path
from rankwise.analysis.ranks import layer_names
from rankwise.comparing.figures import labelled

Rows = Sequence[Mapping[str, Any]]


def training_figures(rows: Rows, metric: str) -> list[tuple[str, go.Figure, str]]:
    """The figures that can be drawn of a task's methods: a name, the figure, and its summary."""
    learnt = [row for row in rows if row["curve"]]
    memorised = [row for row in rows if is_finite(row["training"].get(metric))]
    ranked = [row for row in rows if row["ranks"]]
    found = []
    if learnt:
        found.append(("curves", curves_figure(learnt), _ends(learnt)))
    if memorised:
        found.append(("memorised", memorised_figure(memorised, metric), _gap(memorised, metric)))
    if ranked:
        found.append(("ranks", ranks_figure(ranked), _totals(ranked)))
    return found


def curves_figure(rows: Rows) -> go.Figure:
    """Training loss of the last stage by step, a line for each method."""
    figure = go.Figure(layout=axes("Learning curves", "step", "training loss"))
    for number, row in enumerate(rows):
        curve = [(step, loss) for step, loss in row["curve"]]
        figure.add_trace(path(curve, row["method"], **numbered_line(number)))
    return many_lines(figure)


def memorised_figure(rows: Rows, metric: str) -> go.Figure:
    """The metric on training rows against that on held-out cases, a point for each method."""
    held_out, trained = [row["mean"] for row in rows], [row["training"][metric] for row in rows]
    figure = labelled(rows, held_out, f"{metric}, training rows", "Memorisation and generalisation", trained)
    figure.update_xaxes(title={"text": f"{metric}, held out"}, showgrid=True)
    return figure


def ranks_figure(rows: Rows) -> go.Figure:
    """Directions of the finished update in each layer, methods down."""
    layers = layer_names(layer for row in rows for layer in row["ranks"])
    cells = [
        [round(row["ranks"][layer]) if row["ranks"].get(layer) is not None else None for layer in layers]
        for row in rows
    ]
    top = max(cell for row in cells for cell in row if cell is not None)
    names = [row["method"] for row in rows]
    return heatmap(list(layers.values()), names, cells, top, "Directions by layer", "%{y}, %{x}: %{z}")


def _ends(rows: Rows) -> str:
    ends = ", ".join(f"{row['method']} {row['curve'][-1][1]:.4g}" for row in rows)
    return f"mean over the seeds, with what a method adds to its loss; at the end {ends}"


def _gap(rows: Rows, metric: str) -> str:
    sign = -1 if is_lower_better(metric) else 1
    gaps = {row["method"]: sign * (row["training"][metric] - row["mean"]) for row in rows}
    widest = max(gaps, key=lambda name: gaps[name])
    return f"{widest} is furthest ahead on training rows, by {gaps[widest]:.4g}"


def _totals(rows: Rows) -> str:
    totals = ", ".join(f"{row['method']} {round(sum(row['ranks'].values())):,}" for row in rows)
    return f"mean over the seeds, all layers: {totals}. An update of MiLoRA's kind has up to twice its rank"
