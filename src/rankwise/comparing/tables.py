"""The tables of a comparison, one a task, for the terminal, as Markdown and as LaTeX."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from rankwise.analysis.columns import is_lower_better
from rankwise.analysis.drawing import is_finite
from rankwise.schema import Comparison

Rows = Sequence[Mapping[str, Any]]

HEAD = ("method", "score", "95 % interval", "difference", "p", "parameters", "ms a step", "peak MiB", "rate")
CHOSEN = ("rank", "budget")  # further columns, where they were tried


def ranked(rows: Rows, seeds: int) -> list[Mapping[str, Any]]:
    """A task's methods that have a score, the best mean first; behind them all those without one of every seed."""
    known = [row for row in rows if is_finite(row["mean"])]
    sign = 1 if known and is_lower_better(known[0]["metric"]) else -1
    return sorted(known, key=lambda row: (len(row["values"]) < seeds, sign * row["mean"]))


def lacking(row: Mapping[str, Any], seeds: int) -> str:
    """How many seeds a method's mean is over, where these are not all."""
    number = len(row["values"])
    return f"{number} of {seeds} seeds" if number < seeds else ""


def grid(rows: Rows, seeds: int) -> list[list[str]]:
    """A task's table as texts: the heading, then its rows as they are ranked; what was not possible last."""
    chosen = [name for name in CHOSEN if any(row[name] is not None for row in rows)]
    ordered = [*ranked(rows, seeds), *(row for row in rows if row["mean"] is None)]
    return [[*HEAD, *chosen], *(_texts(row, chosen, lacking(row, seeds)) for row in ordered)]


def _texts(row: Mapping[str, Any], chosen: Sequence[str], lacks: str) -> list[str]:
    if row["mean"] is None:
        return [row["method"], "not possible" if row["failed"] else "-", *["-"] * (len(HEAD) + len(chosen) - 2)]
    score = f"{row['mean']:.4f}" + ("" if row["deviation"] is None else f" ± {row['deviation']:.4f}")
    score += f", {lacks}" if lacks else ""
    difference = "-" if row["difference"] is None else f"{row['difference']:+.4f}"
    p = "-" if row["p_holm"] is None else f"{row['p_holm']:.2g}"
    left = row["parameters_left"]
    parameters = f"{row['parameters']:,}" + (f", {left:,.0f} left" if left is not None else "")
    step = "-" if row["step_seconds"] is None else f"{1000 * row['step_seconds']:.1f}"
    memory = "-" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**20:,.0f}"
    interval = "-" if row["low"] is None else f"{row['low']:.4f} to {row['high']:.4f}"
    settings = ["-" if row[name] is None else f"{row[name]:g}" for name in ("learning_rate", *chosen)]
    return [row["method"], score, interval, difference, p, parameters, step, memory, *settings]


def caption(rows: Rows, seeds: int, against: str) -> str:
    """What a task's table shows."""
    metric = next((row["metric"] for row in rows if row["metric"]), "no score")
    better = "less" if is_lower_better(metric) else "more"
    over = f"{seeds} seeds" if seeds > 1 else "one seed"
    if any(row["values"] and lacking(row, seeds) for row in rows):
        over += " (of fewer where the row says so: these rows come last)"
    return (
        f"{metric} ({better} is better), mean and standard deviation over {over}; "
        f"difference from {against}, paired by seed, and p of a t-test, by Holm's correction"
    )


def search_note(rows: Rows) -> str:
    """Of which of a task's methods the search did not choose the setting, and why; empty where it chose all."""
    why: dict[str, list[str]] = {}
    for row in rows:
        if reason := row.get("undecided"):  # summaries of earlier versions do not say
            why.setdefault(reason, []).append(row["method"])
    if not why:
        return ""
    number, said = sum(map(len, why.values())), [f"{', '.join(names)} ({reason})" for reason, names in why.items()]
    taken = "of equal ones that with the least training loss was taken, and where all failed the first listed"
    return f"The search did not choose the setting of {number} of {len(rows)} methods ({taken}): {'; '.join(said)}."


def terminal_tables(comparison: Comparison, summary: Rows) -> list[Table]:
    """A table for each task."""
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
    """Each task's caption, table and note."""
    seeds = len(comparison.seeds)
    for task in comparison.tasks:
        rows = [row for row in summary if row["task"] == task]
        yield f"{task}: {caption(rows, seeds, comparison.baseline)}", grid(rows, seeds), search_note(rows)


def _escaped(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "±": r"$\pm$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {sign: f"\\{sign}" for sign in "&%$#_{}"}
    return "".join(special.get(sign, sign) for sign in text)
