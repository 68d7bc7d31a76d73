"""The tables of a comparison, one a task, for the terminal, as Markdown and as LaTeX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from rankwise.analysis.columns import is_lower_better
from rankwise.schema import Comparison

HEAD = ("method", "score", "95 % interval", "difference", "p", "parameters", "ms a step", "peak MiB", "rate")
CHOSEN = ("rank", "budget")  # further columns, where they were tried


def grid(summary: Sequence[Mapping[str, Any]], task: str) -> list[list[str]]:
    """A task's table as texts: the heading, then its rows, the best score first; what was not possible last."""
    rows = [row for row in summary if row["task"] == task]
    lower = any(row["metric"] and is_lower_better(row["metric"]) for row in rows)
    known = [row for row in rows if row["mean"] is not None]
    known.sort(key=lambda row: row["mean"] if lower else -row["mean"])
    chosen = [name for name in CHOSEN if any(row[name] is not None for row in rows)]
    ordered = [*known, *(row for row in rows if row["mean"] is None)]
    return [[*HEAD, *chosen], *(_texts(row, chosen) for row in ordered)]


def _texts(row: Mapping[str, Any], chosen: Sequence[str]) -> list[str]:
    if row["mean"] is None:
        return [row["method"], "not possible" if row["failed"] else "-", *["-"] * (len(HEAD) + len(chosen) - 2)]
    score = f"{row['mean']:.4f}" + ("" if row["deviation"] is None else f" ± {row['deviation']:.4f}")
    difference = "-" if row["difference"] is None else f"{row['difference']:+.4f}"
    p = "-" if row["p_holm"] is None else f"{row['p_holm']:.2g}"
    left = row["parameters_left"]
    parameters = f"{row['parameters']:,}" + (f", {left:,.0f} left" if left is not None else "")
    step = "-" if row["step_seconds"] is None else f"{1000 * row['step_seconds']:.1f}"
    memory = "-" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**20:,.0f}"
    interval = "-" if row["low"] is None else f"{row['low']:.4f} to {row['high']:.4f}"
    settings = ["-" if row[name] is None else f"{row[name]:g}" for name in ("learning_rate", *chosen)]
    return [row["method"], score, interval, difference, p, parameters, step, memory, *settings]


def caption(comparison: Comparison, summary: Sequence[Mapping[str, Any]], task: str) -> str:
    """What a task's table shows."""
    metric = next((row["metric"] for row in summary if row["task"] == task and row["metric"]), "no score")
    better = "less" if is_lower_better(metric) else "more"
    return (
        f"{task}: {metric} ({better} is better), mean and standard deviation over {len(comparison.seeds)} seeds; "
        f"difference from {comparison.baseline}, and p of a paired t-test, by Holm's correction"
    )


def terminal_tables(comparison: Comparison, summary: Sequence[Mapping[str, Any]]) -> list[Table]:
    """A table for each task."""
    tables = []
    for task in comparison.tasks:
        table = Table(title=caption(comparison, summary, task), title_justify="left", box=None)
        head, *rows = grid(summary, task)
        for number, heading in enumerate(head):
            table.add_column(heading, justify="left" if number == 0 else "right", no_wrap=True)
        for texts in rows:
            table.add_row(*texts)
        tables.append(table)
    return tables


def markdown(comparison: Comparison, summary: Sequence[Mapping[str, Any]]) -> str:
    """The tables as Markdown."""
    parts = []
    for task in comparison.tasks:
        found = grid(summary, task)
        head, *rows = [f"| {' | '.join(text.replace('|', chr(92) + '|') for text in row)} |" for row in found]
        rule = "|---|" + "---:|" * (len(found[0]) - 1)
        lines = [f"**{caption(comparison, summary, task)}**", "", head, rule, *rows]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def latex(comparison: Comparison, summary: Sequence[Mapping[str, Any]]) -> str:
    """The tables as LaTeX, each a ``table`` with a ``tabular``, with no package but the kernel's."""
    parts = []
    for task in comparison.tasks:
        found = grid(summary, task)
        rows = [" & ".join(map(_escaped, row)) + r" \\" for row in found]
        rows.insert(1, r"\hline")
        body = "\n".join(rows)
        text = _escaped(caption(comparison, summary, task))
        begin = r"\begin{tabular}{l" + "r" * (len(found[0]) - 1) + "}"
        parts.append(
            "\\begin{table}\n\\caption{" + text + "}\n" + begin + f"\n{body}\n" + "\\end{tabular}\n\\end{table}"
        )
    return "\n\n".join(parts) + "\n"


def _escaped(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "±": r"$\pm$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {sign: f"\\{sign}" for sign in "&%$#_{}"}
    return "".join(special.get(sign, sign) for sign in text)
