"""Scores on training rows beside those on held-out cases: by stage, and as directions are given up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from rankwise.analysis.columns import ABSENT, write_value
from rankwise.analysis.drawing import COLORS, axes, is_finite, scatter, short
from rankwise.analysis.markup import Cell, muted, plot, section, table
from rankwise.analysis.runfolder import Run

TITLE = "Memorisation and generalisation"
WIDE = 8  # from this ratio on, sizes are shown on a log scale
SCORES = {"training": "training (memorisation)", "held_out": "held out (generalisation)"}


def retained(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The stages whose row has a training score, a held-out score and the parameters left, by the first metric.

    Returns:
        For each ``stage``, ``gates_left``, ``gates``, ``parameters``, ``training`` and ``held_out``, in the order of
        the results.
    """
    left = {str(row["name"]): row.get("adapter") or {} for row in results.get("rows") or []}
    return [
        row
        | {"parameters": left[row["stage"]]["parameters_left"]}
        | {name: left[row["stage"]].get(name) for name in ("gates_left", "gates")}
        for row in measured_twice(results)
        if is_finite(left[row["stage"]].get("parameters_left"))
    ]


def measured_twice(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows with a training and a held-out score by the first metric: ``stage``, ``training`` and ``held_out``."""
    metric = next(iter(results.get("columns") or []), "")
    found = [
        {
            "stage": str(row["name"]),
            "training": (row.get("training_metrics") or {}).get(metric),
            "held_out": row["metrics"].get(metric),
        }
        for row in results.get("rows") or []
    ]
    return [row for row in found if all(is_finite(row[key]) for key in SCORES)]


def stage_curve(results: Mapping[str, Any]) -> go.Figure | None:
    """The first metric on training rows and on held-out cases, a marker for each row: the base, and the stages.

    ``None`` where fewer than two rows have both scores.
    """
    rows = measured_twice(results)
    if len(rows) < 2:
        return None
    metric = results["columns"][0]
    figure = go.Figure(layout=axes(f"{metric[:1].upper()}{metric[1:]} by stage", "", metric))
    for (key, name), color in zip(SCORES.items(), (COLORS["training"], COLORS["evaluation"]), strict=True):
        style = {"line": {"color": color, "width": 2}, "marker": {"color": color, "size": 8}}
        stages = [row["stage"] for row in rows]
        figure.add_trace(scatter(stages, [row[key] for row in rows], name, mode="lines+markers", **style))
    figure.update_xaxes(type="category", automargin=True)
    return figure


def retention_curve(results: Mapping[str, Any]) -> go.Figure | None:
    """The first metric on training rows and on held-out cases against the parameters left, a marker for each stage.

    ``None`` where fewer than two stages have both scores.

    Source: SoRA (arXiv 2311.11696), whose code divides either score by that of its first stage; these are the scores.
    """
    rows = sorted(retained(results), key=lambda row: row["parameters"])
    if len(rows) < 2:
        return None
    metric, sizes = results["columns"][0], [row["parameters"] for row in rows]
    figure = go.Figure(layout=axes(f"{metric[:1].upper()}{metric[1:]} by parameters left", "parameters left", metric))
    for (key, name), color in zip(SCORES.items(), (COLORS["training"], COLORS["evaluation"]), strict=True):
        figure.add_trace(
            scatter(
                sizes,
                [row[key] for row in rows],
                name,
                mode="lines+markers+text",
                text=[row["stage"] for row in rows],
                textposition="top center",
                textfont={"size": 11},
                line={"color": color, "width": 2},
                marker={"color": color, "size": 8},
                hovertemplate="%{text}, %{x:,} parameters: %{y:.4~g}",
                cliponaxis=False,
            )
        )
    figure.update_layout(hovermode="closest")
    if 0 < WIDE * sizes[0] < sizes[-1]:  # else the small ones would be one spot
        figure.update_xaxes(type="log", title={"text": "parameters left (log scale)"}, dtick="D2")
    return figure


def retention_section(run: Run) -> str:
    """The figure and its table; nothing where fewer than two rows of results were measured on training rows."""
    figure = retention_curve(run.results)
    if figure is None:
        return _stages_section(run)
    rows, metric = retained(run.results), run.results["columns"][0]
    drawn = _drawn(run)
    note = muted(f"The {metric} on {drawn} and on the held-out cases, by what each stage's gates leave of the adapter.")
    head = ["stage", "threshold", "gates left", "parameters", f"training {metric}", f"held-out {metric}"]
    thresholds = stage_thresholds(run.recipe)
    body = table("Every stage, in the order of training.", head, [_cells(row, metric, thresholds) for row in rows])
    return section(TITLE, note + plot(figure, "retention", _summary(rows)) + body)


def _stages_section(run: Run) -> str:
    """The same by stage: of an adapter without gates, or of a single stage beside the base."""
    figure = stage_curve(run.results)
    if figure is None:
        return ""
    rows, metric = measured_twice(run.results), run.results["columns"][0]
    note = muted(f"The {metric} on {_drawn(run)} and on the held-out cases.")
    cells: list[list[Cell]] = [
        [(row["stage"], ""), *((write_value(metric, row[key]), "") for key in SCORES)] for row in rows
    ]
    body = table(
        "The model at each stage, in the order of training.",
        ["stage", f"training {metric}", f"held-out {metric}"],
        cells,
    )
    scores = "; ".join(f"{name} {short(rows[0][key])} to {short(rows[-1][key])}" for key, name in SCORES.items())
    return section(TITLE, note + plot(figure, "retention", scores) + body)


def _drawn(run: Run) -> str:
    number = next((row["training_cases"] for row in run.results["rows"] if row.get("training_cases")), None)
    return f"{number:,} training rows" if number else "training rows"


def stage_thresholds(recipe: Mapping[str, Any]) -> dict[str, float]:
    """The threshold of each of a recipe's stages, its own or the adapter's; none where there is a budget instead."""
    adapter, stages = recipe.get("adapter"), recipe.get("stages")
    if not isinstance(adapter, Mapping) or not isinstance(stages, list):
        return {}
    budget = adapter.get("target_parameters") or adapter.get("target_ratio")
    common = None if budget else adapter.get("threshold")
    named = [stage for stage in stages if isinstance(stage, Mapping)]
    own = {str(one.get("name")): one["threshold"] if is_finite(one.get("threshold")) else common for one in named}
    return {stage: threshold for stage, threshold in own.items() if is_finite(threshold)}


def _cells(row: Mapping[str, Any], metric: str, thresholds: Mapping[str, float]) -> list[Cell]:
    threshold, gates = thresholds.get(row["stage"]), row["gates_left"]
    texts = [
        row["stage"],
        ABSENT if threshold is None else f"{threshold:.3g}",
        ABSENT if gates is None else f"{gates:,}" + (f" of {row['gates']:,}" if row["gates"] else ""),
        f"{row['parameters']:,}",
        *(write_value(metric, row[key]) for key in SCORES),
    ]
    return [(text, "") for text in texts]


def _summary(rows: list[dict[str, Any]]) -> str:
    """Where both scores start and end, in the order of training."""
    first, last = rows[0], rows[-1]
    at = f"from {first['parameters']:,} parameters ({first['stage']}) to {last['parameters']:,} ({last['stage']})"
    scores = "; ".join(f"{name} {short(first[key])} to {short(last[key])}" for key, name in SCORES.items())
    return f"{at}: {scores}"
