"""HTML of sections, tables and figures; every text that is handed in is escaped here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape

import plotly.graph_objects as go

Cell = tuple[str, str]  # text, and the attributes of its element


def section(title: str, body: str, attributes: str = "", anchor: str = "") -> str:
    """A titled section with an anchor, made of its title where none is given; ``body`` is HTML."""
    anchor = re.sub(r"[^A-Za-z0-9_.-]+", "-", anchor or title.lower())
    head = f'<h2 id="{anchor}-title">{escape(title)}</h2>'
    return f'<section id="{anchor}" aria-labelledby="{anchor}-title"{attributes}>\n{head}\n{body}\n</section>'


def muted(text: str) -> str:
    """A paragraph that says what is absent or beside the point."""
    return f'<p class="muted">{escape(text)}</p>'


def table(
    caption: str,
    head: Sequence[str],
    rows: Iterable[Sequence[Cell]],
    foot: Sequence[str] = (),
    kind: str = "",
) -> str:
    """A table whose first column heads its rows; the other columns are numbers, aligned to the right."""
    heads = "".join(f'<th scope="col"{_aligned(at)}>{escape(name)}</th>' for at, name in enumerate(head))
    body = "\n".join(f"<tr>{''.join(map(_cell, range(len(row)), row))}</tr>" for row in rows)
    last = "".join(f"<td{_aligned(at)}>{escape(text)}</td>" for at, text in enumerate(foot))
    tail = f"<tfoot><tr>{last}</tr></tfoot>" if foot else ""
    return (
        f'<div class="scroll{kind}"><table><caption><span>{escape(caption)}</span></caption>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody>{tail}</table></div>"
    )


def _aligned(place: int) -> str:
    return ' class="number"' if place else ""


def _cell(place: int, cell: Cell) -> str:
    text, attributes = cell
    if place == 0:
        return f'<th scope="row"{attributes}>{escape(text)}</th>'
    return f"<td{attributes or _aligned(place)}>{escape(text)}</td>"


def pairs_table(caption: str, head: Sequence[str], pairs: Mapping[str, str], foot: Sequence[str] = ()) -> str:
    """A narrow table of names and values."""
    rows = [[(str(name), ""), (value, "")] for name, value in pairs.items()]
    return table(caption, head, rows, foot, " narrow")


def plot(figure: go.Figure, name: str, description: str) -> str:
    """A figure with a name: title and description as text, its data in the element after it, for the page's script."""
    title = escape(figure.layout.title.text)
    bare = go.Figure(figure).update_layout(title=None, margin={"t": 30})
    # "<" could end the script element; in JSON it occurs in strings only, where this is the same character.
    data = json.dumps(json.loads(bare.to_json()), separators=(",", ":")).replace("<", "\\u003c")
    style = f"min-height:{bare.layout.height}px"
    return (
        f"<figure>\n<figcaption><h3>{title}</h3><span>{escape(description)}</span></figcaption>\n"
        f'<div class="plot" role="img" aria-label="{title}" style="{style}"></div>\n'
        f'<script type="application/json" data-figure="{escape(name)}">{data}</script>\n</figure>'
    )
