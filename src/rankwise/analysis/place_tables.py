"""Where updates lie, as a table on the console and as a section of the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from rich.table import Table

from rankwise.analysis.drawing import COLORS, LINES, axes, short
from rankwise.analysis.markup import Cell, muted, plot, section, table
from rankwise.analysis.places import SHARES, places_by_kind, spectra_by_kind
from rankwise.analysis.runfolder import Run
from rankwise.errors import UserError
from rankwise.reading import read_json

PLACES = "updates.json"
TITLE = "Where the updates lie"
HEAD = ("modules", "of the weight's norm", "effective rank", *SHARES, "chance", "amplification", "intruders")
MEANING = (
    "Shares of the update's squared norm within {rank} directions at the top, in the middle and at the bottom of each "
    "weight's spectrum, beside that of a random update (chance); how much stronger the update is in its own directions "
    "than the weight was (amplification); and how many of the ten largest directions of the changed weight are none of "
    "the old one (intruders). Means over layers."
)


def place_texts(name: str, means: Mapping[str, Any]) -> list[str]:
    """What the means are of, and the cells under :data:`HEAD`."""
    amplification = means["amplification"]
    return [
        name,
        str(means["modules"]),
        f"{means['relative']:.4f}",
        f"{means['effective_rank']:.1f}",
        *(f"{100 * means[part]:.3g} %" for part in (*SHARES, "chance")),
        "-" if amplification is None or math.isinf(amplification) else f"{amplification:.3g}",
        f"{means['intruders']:.1f}",
    ]


def _texts_by_kind(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [place_texts(kind["kind"], kind) for kind in places_by_kind(rows)]


def place_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """For a terminal."""
    made = Table("kind", title=TITLE, caption=MEANING.format(rank=max(row["rank"] for row in rows)))
    for heading in HEAD:
        made.add_column(heading, justify="right")
    for texts in _texts_by_kind(rows):
        made.add_row(*texts)
    return made


def place_section(run: Run) -> str:
    """For the report; nothing where the run did not look."""
    path = run.folder / PLACES
    if not path.is_file():
        return ""
    try:
        rows = read_json(path, list, "remove it, or run again")
        texts, kinds = _texts_by_kind(rows), places_by_kind(rows)
        words = f"over all modules, of what chance would have: {times_chance(kinds[-1])}"
        figures = plot(place_figure({kind["kind"]: kind for kind in kinds}), "places", words)
        if all("spectra" in row for row in rows):  # not where an earlier version looked
            figures += plot(spectrum_figure(rows)[0], "spectra", spectrum_figure(rows)[1])
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path} is no list of updates ({error!r}): remove it, or run again") from error
    cells: list[list[Cell]] = [[(text, "") for text in row] for row in texts]
    note = muted(MEANING.format(rank=max(row["rank"] for row in rows)))
    caption = f"{len(rows):,} modules. A heading sorts."
    return section(TITLE, note + figures + table(caption, ["kind", *HEAD], cells, kind=" sortable"))


def place_figure(means: Mapping[str, Mapping[str, Any]]) -> go.Figure:
    """How much more of the updates lies in each part than chance would have it, by what the means are of."""
    figure = go.Figure(layout=axes("Share of the update over that of a random one", "", "times chance (log scale)"))
    colors = dict(zip(SHARES, (COLORS["training"], COLORS["gates"], COLORS["evaluation"]), strict=True))
    for part in SHARES:
        figure.add_trace(
            go.Scatter(
                x=list(means),
                y=[max(one[part] / one["chance"], 1e-6) for one in means.values()],
                name=part,
                mode="markers",
                marker={"color": colors[part], "size": 10},
                hovertemplate="%{y:.3~g} times chance",
            )
        )
    figure.add_hline(y=1, line={"color": COLORS["text"], "dash": "dot", "width": 1})
    figure.update_yaxes(type="log", dtick=1)
    figure.update_xaxes(type="category", automargin=True)
    return figure


def times_chance(means: Mapping[str, Any]) -> str:
    """The share in each part as a multiple of chance."""
    return ", ".join(f"{part} {means[part] / means['chance']:.3g} times" for part in SHARES)


def spectrum_figure(rows: Sequence[Mapping[str, Any]]) -> tuple[go.Figure, str]:
    """Singular values of the weights (lines) and of their updates (dashes), by kind; and the largest in a sentence."""
    figure = go.Figure(layout=axes("Spectra of the weights and of the updates", "direction (log scale)", "log scale"))
    found = spectra_by_kind(rows)
    for number, (kind, spectra) in enumerate(found.items()):
        color = LINES[number % len(LINES)]
        for side, dash in (("weight", "solid"), ("update", "dash")):
            places, values = zip(*spectra[side], strict=True)
            figure.add_trace(
                go.Scatter(
                    x=places,
                    y=values,
                    name=kind if side == "weight" else f"{kind}, update",
                    legendgroup=kind,
                    showlegend=side == "weight",
                    mode="lines" if len(places) > 1 else "markers",
                    line={"color": color, "dash": dash, "width": 2},
                    hovertemplate="%{y:.3~g}",
                )
            )
    figure.update_xaxes(type="log", dtick=1)
    figure.update_yaxes(type="log", dtick=1)
    figure.update_layout(height=400)
    largest = (f"{kind} {short(both['weight'][0][1])}, {short(both['update'][0][1])}" for kind, both in found.items())
    return figure, f"lines are weights, dashes updates; the largest of each, means over layers: {'; '.join(largest)}"
