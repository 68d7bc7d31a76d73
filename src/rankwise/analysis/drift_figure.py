"""How far hidden states have drifted, as a figure and as a section of the report."""

from __future__ import annotations

from collections.abc import Mapping

import plotly.graph_objects as go

from rankwise.analysis.drawing import axes, is_finite, numbered_line, scatter, short
from rankwise.analysis.markup import muted, plot, section
from rankwise.analysis.runfolder import Run

TITLE = "How far hidden states have drifted"
MEANING = (
    "Linear CKA of each layer's hidden states before and after training, over tokens of the same rows: 1 where one is "
    "the other turned and scaled. n tokens (2,048 at most) whose states of width k have nothing in common still give "
    "about k / (n + k). Layer 0 is the embeddings."
)
Layers = Mapping[str, float | None]


def drift_section(run: Run) -> str:
    """For the report; nothing where the run did not look."""
    found = run.results.get("drift") or {}
    if not any(known(layers) for layers in found.values()):
        return ""
    return section(TITLE, muted(MEANING) + plot(drift_figure(found), "drift", drift_words(found)))


def drift_figure(found: Mapping[str, Layers], title: str = "Hidden states before and after training") -> go.Figure:
    """CKA by layer, a line for each name."""
    figure = go.Figure(layout=axes(title, "layer", "linear CKA"))
    for number, (name, layers) in enumerate(found.items()):
        values = known(layers)
        line = {"width": 2, **numbered_line(number)}
        figure.add_trace(scatter(list(values), list(values.values()), name, mode="lines+markers", line=line))
    figure.update_xaxes(type="category")
    return figure


def drift_words(found: Mapping[str, Layers]) -> str:
    """The layer of each name that drifted most."""
    least = {
        name: min(known(layers).items(), key=lambda one: one[1]) for name, layers in found.items() if known(layers)
    }
    return "; ".join(f"{name}: least in layer {layer}, {short(value)}" for name, (layer, value) in least.items())


def known(layers: Layers) -> dict[str, float]:
    """Those layers that could be compared."""
    return {layer: value for layer, value in layers.items() if is_finite(value)}
