"""The tables of a comparison for the terminal, as Markdown and as LaTeX."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from rankwise.comparing.overview import overview_caption, overview_grid, overview_note, overview_of
from rankwise.comparing.tables import by_task, caption, grid, search_note

Part = tuple[str, list[list[str]], str]  # caption, table, note


def terminal_tables(results: Mapping[str, Any]) -> list[Group]:
    """A table of all tasks, if there are several, and one for each, between its caption and its note.

    The first has no scores, which the others have, so that it fits beside any number of tasks.
    """
    parts = []
    for title, (head, *rows), note in [*_of_all(results, scores=False), *_of_each(results)]:
        table = Table(box=None)
        for number, heading in enumerate(head):
            table.add_column(heading, justify="left" if number == 0 else "right", no_wrap=True)
        for texts in rows:
            table.add_row(*texts)
        parts.append(Group(Text(f"\n{title}", "italic"), table, *([Text(note, "italic dim")] if note else [])))
    return parts


def markdown(results: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    parts = []
    for title, found, note in _parts(results):
        head, *rows = [f"| {' | '.join(text.replace('|', chr(92) + '|') for text in row)} |" for row in found]
        rule = "|---|" + "---:|" * (len(found[0]) - 1)
        parts.append("\n".join([f"**{title}**", "", head, rule, *rows, *(["", note] if note else [])]))
    return "\n\n".join(parts) + "\n"


def latex(results: Mapping[str, Any]) -> str:
    """The tables as LaTeX, each a ``table`` with a ``tabular``, with no package but the kernel's."""
    parts = []
    for title, found, note in _parts(results):
        head, *rows = [" & ".join(map(_escaped, row)) + r" \\" for row in found]
        columns = "l" + "r" * (len(found[0]) - 1)
        lines = [r"\begin{table}", rf"\caption{{{_escaped(title)}}}", rf"\begin{{tabular}}{{{columns}}}"]
        lines += [head, r"\hline", *rows, r"\end{tabular}", *([rf"\par {_escaped(note)}"] if note else [])]
        parts.append("\n".join([*lines, r"\end{table}"]))
    return "\n\n".join(parts) + "\n"


def _parts(results: Mapping[str, Any]) -> list[Part]:
    return [*_of_all(results), *_of_each(results)]


def _of_all(results: Mapping[str, Any], scores: bool = True) -> Iterator[Part]:
    """Of all tasks, if there are several."""
    overview = overview_of(results)
    if len(overview.tasks) > 1:
        table = [row if scores else [*row[:2], row[-1]] for row in overview_grid(overview)]
        yield overview_caption(overview, scores), table, overview_note(overview)


def _of_each(results: Mapping[str, Any]) -> Iterator[Part]:
    seeds = len(results["seeds"])
    for task, rows in by_task(results["rows"]).items():
        yield f"{task}: {caption(rows, seeds, results['against'])}", grid(rows, seeds), search_note(rows)


def _escaped(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "±": r"$\pm$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {sign: f"\\{sign}" for sign in "&%$#_{}"}
    return "".join(special.get(sign, sign) for sign in text)
