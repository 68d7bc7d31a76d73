"""What went on within the runs of a comparison: their losses as they learnt, and the ranks that were left by layer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from rankwise.analysis.columns import Number
from rankwise.analysis.drawing import DASHES, LINES, axes, heatmap, is_finite, points, scatter
from rankwise.analysis.ranks import layer_names, split_module
from rankwise.comparing.figures import labelled

POINTS = 50  # of a learning curve, at most
Rows = Sequence[Mapping[str, Any]]
Curve = Sequence[Sequence[Number]]


def loss_curve(metrics: Path) -> list[list[Number]]:
    """Steps of the last stage with its training loss, means over equally many log lines so that they are few."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    last = [line for line in lines if line.get("stage") == lines[-1].get("stage")]
    found = points(last, "loss")
    size = math.ceil(len(found) / POINTS) or 1
    parts = [found[at : at + size] for at in range(0, len(found), size)]
    return [[part[-1][0], math.fsum(loss for _, loss in part) / len(part)] for part in parts]


def layer_ranks(ranks: Path) -> dict[str, int]:
    """Directions of each layer's modules together; none where the run has no ranks."""
    if not ranks.is_file():
        return {}
    rows = json.loads(ranks.read_text(encoding="utf-8"))
    found: dict[str, int] = {}
    for layer, rank in ((split_module(row["module"])[0], row["rank"]) for row in rows):
        found[layer] = found.get(layer, 0) + rank
    return {name: found[layer] for layer, name in layer_names(found).items()}


def mean_curve(curves: Iterable[Curve]) -> list[list[Number]]:
    """The mean over runs at the steps that all of them have."""
    found = [{step: loss for step, loss in curve} for curve in curves if curve]
    steps = [step for step in found[0] if all(step in one for one in found)] if found else []
    return [[step, math.fsum(one[step] for one in found) / len(found)] for step in steps]


def curves_figure(rows: Rows) -> go.Figure | None:
    """Training loss of the last stage by step, a line for each method; None where no run kept it."""
    known = [row for row in rows if row.get("curve")]
    if not known:
        return None
    figure = go.Figure(layout=axes("Learning curves", "step", "training loss"))
    for number, row in enumerate(known):
        line = {"color": LINES[number % len(LINES)], "width": 2, "dash": DASHES[number // len(LINES) % len(DASHES)]}
        steps, losses = zip(*row["curve"], strict=True)
        figure.add_trace(scatter(steps, losses, row["method"], mode="lines", line=line))
    legend = {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.2, "yanchor": "top"}
    figure.update_layout(legend=legend, height=380 + 8 * len(known))
    return figure


def ranks_figure(rows: Rows) -> go.Figure | None:
    """Directions left in each layer, methods down; None where no method has ranks."""
    known = {row["method"]: row["ranks"] for row in rows if row.get("ranks")}
    if not known:
        return None
    layers = list(dict.fromkeys(layer for found in known.values() for layer in found))
    cells = [[round(found[layer]) if layer in found else None for layer in layers] for found in known.values()]
    top = max(cell for row in cells for cell in row if cell is not None)
    return heatmap(layers, list(known), cells, top, "Directions by layer, mean over the seeds", "%{y}, %{x}: %{z}")


def memorised_figure(rows: Rows, metric: str) -> go.Figure | None:
    """The metric on training rows against that on held-out cases, a point for each method; None where not measured."""
    known = [row for row in rows if is_finite((row.get("training") or {}).get(metric))]
    if not known:
        return None
    held_out, trained = [row["mean"] for row in known], [row["training"][metric] for row in known]
    figure = labelled(known, held_out, f"{metric}, training rows", "Memorisation and generalisation", trained)
    figure.update_xaxes(title={"text": f"{metric}, held out"}, showgrid=True)
    return figure


def inside_figures(rows: Rows, metric: str) -> list[tuple[str, go.Figure, str]]:
    """Those of the three that can be drawn: a name, the figure, and its summary."""
    found = [
        ("curves", curves_figure(rows), _last(rows)),
        ("memorised", memorised_figure(rows, metric), _gap(rows, metric)),
        ("ranks", ranks_figure(rows), _totals(rows)),
    ]
    return [(name, figure, words) for name, figure, words in found if figure is not None]


def _last(rows: Rows) -> str:
    ends = {row["method"]: row["curve"][-1][1] for row in rows if row.get("curve")}
    if not ends:
        return ""
    least, most = min(ends, key=lambda name: ends[name]), max(ends, key=lambda name: ends[name])
    return f"at the end {least} has the least training loss ({ends[least]:.4g}), {most} the most ({ends[most]:.4g})"


def _gap(rows: Rows, metric: str) -> str:
    gaps = {
        row["method"]: abs(row["training"][metric] - row["mean"])
        for row in rows
        if is_finite((row.get("training") or {}).get(metric))
    }
    if not gaps:
        return ""
    widest = max(gaps, key=lambda name: gaps[name])
    return f"{widest} has the widest gap between training rows and held-out cases, {gaps[widest]:.4g}"


def _totals(rows: Rows) -> str:
    totals = {row["method"]: round(sum(row["ranks"].values())) for row in rows if row.get("ranks")}
    return "in all layers: " + ", ".join(f"{name} {total:,}" for name, total in totals.items())
