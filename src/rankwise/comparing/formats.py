"""The tables of a comparison for the terminal, as Markdown and as LaTeX."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from rankwise.comparing.overview import WEIGHT, overview_caption, overview_grid
from rankwise.comparing.tables import Rows, caption, grid, search_note
from rankwise.schema import Comparison


def terminal_tables(comparison: Comparison, summary: Rows) -> list[Table]:
    """A table of all tasks, if there are several, and one for each."""
    tables = []
    for title, (head, *rows), note in _parts(comparison, summary):
        table = Table(title=Text(title), title_justify="left", box=None, caption_justify="left")
        table.caption = Text(note) if note else None
        for number, heading in enumerate(head):
            table.add_column(heading, justify="left" if number == 0 else "right", no_wrap=True)
        for texts in rows:
            table.add_row(*texts)
        tables.append(table)
    return tables


def markdown(comparison: Comparison, summary: Rows) -> str:
    """The tables as Markdown."""
    parts = []
    for title, found, note in _parts(comparison, summary):
        head, *rows = [f"| {' | '.join(text.replace('|', chr(92) + '|') for text in row)} |" for row in found]
        rule = "|---|" + "---:|" * (len(found[0]) - 1)
        parts.append("\n".join([f"**{title}**", "", head, rule, *rows, *(["", note] if note else [])]))
    return "\n\n".join(parts) + "\n"


def latex(comparison: Comparison, summary: Rows) -> str:
    """The tables as LaTeX, each a ``table`` with a ``tabular``, with no package but the kernel's."""
    parts = []
    for title, found, note in _parts(comparison, summary):
        head, *rows = [" & ".join(map(_escaped, row)) + r" \\" for row in found]
        columns = "l" + "r" * (len(found[0]) - 1)
        lines = [r"\begin{table}", rf"\caption{{{_escaped(title)}}}", rf"\begin{{tabular}}{{{columns}}}"]
        lines += [head, r"\hline", *rows, r"\end{tabular}", *([rf"\par {_escaped(note)}"] if note else [])]
        parts.append("\n".join([*lines, r"\end{table}"]))
    return "\n\n".join(parts) + "\n"


def _parts(comparison: Comparison, summary: Rows) -> Iterator[tuple[str, list[list[str]], str]]:
    """Caption, table and note: of all tasks, if there are several, and of each."""
    seeds = len(comparison.seeds)
    if len(comparison.tasks) > 1:
        yield overview_caption(summary, seeds), overview_grid(summary, seeds), WEIGHT
    for task in comparison.tasks:
        rows = [row for row in summary if row["task"] == task]
        yield f"{task}: {caption(rows, seeds, comparison.baseline)}", grid(rows, seeds), search_note(rows)


def _escaped(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "±": r"$\pm$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {sign: f"\\{sign}" for sign in "&%$#_{}"}
    return "".join(special.get(sign, sign) for sign in text)
