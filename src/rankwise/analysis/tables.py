"""Results as tables: of one run, and of several runs as mean and standard deviation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from rankwise.analysis.columns import ABSENT, Number, best_rows, write_value
from rankwise.analysis.runfolder import Run, read_run, settings
from rankwise.errors import UserError

# Settings in which runs of one recipe may differ.
_FREE = ("seed", "output")


def cells(results: Mapping[str, Any]) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """Head and body of a result as text, each cell with whether it is the best of its column.

    Args:
        results: ``columns`` and ``rows`` of one run, or what :func:`combined` returns.

    Returns:
        The names of the columns, the first of them "name"; then "cases" and "runs" where the rows have them.
    """
    rows, columns = results["rows"], results["columns"]
    tail = [key for key in ("cases", "n") if any(row.get(key) is not None for row in rows)]
    best = {name: best_rows(name, [row["metrics"].get(name) for row in rows]) for name in columns}
    body = [
        [(str(row["name"]), False)]
        + [(write_value(name, row["metrics"].get(name)), place in best[name]) for name in columns]
        + [(ABSENT if row.get(key) is None else f"{row[key]:,}", False) for key in tail]
        for place, row in enumerate(rows)
    ]
    return ["name", *columns, *({"cases": "cases", "n": "runs"}[key] for key in tail)], body


def result_table(results: Mapping[str, Any]) -> Table:
    """A console table of one run's results or of :func:`combined` ones, the best of each column in bold."""
    head, body = cells(results)
    notes = results.get("notes") or []
    table = Table(box=SIMPLE_HEAD, padding=0, show_edge=False, caption=Text("\n".join(notes)) if notes else None)
    # "fold" everywhere: in a narrow terminal a number goes on in the next line, and no digit is lost.
    for name in ("", *head[1:]):
        table.add_column(Text(name), justify="right" if name else "left", overflow="fold")
    for row in body:
        table.add_row(*(Text(text, style="bold" if best else "") for text, best in row))
    return table


def result_markdown(results: Mapping[str, Any]) -> str:
    """The same table as markdown, for documentation; notes follow it as a list."""
    head, body = cells(results)
    lines = [[_escaped(name) for name in ("", *head[1:])], ["---"] + ["---:"] * (len(head) - 1)]
    lines += [[f"**{_escaped(text)}**" if best else _escaped(text) for text, best in row] for row in body]
    notes = "".join(f"- {_escaped(note)}\n" for note in results.get("notes") or [])
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{table}\n{notes}" if notes else table


def _escaped(text: str) -> str:
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())


def combined(runs: Sequence[Path]) -> dict[str, Any]:
    """Mean and sample standard deviation (n - 1) over runs of one recipe that differ in their seed.

    Returns:
        ``task``, ``columns``, ``rows`` and ``notes``. A row has ``name``; ``metrics``, for each column its
        ``mean``, ``sd`` (``None`` for one run) and ``n``; ``cases``, ``None`` where runs differ in it; and
        ``n``, the runs that have the row. Notes say in what the runs differ beside seed and output.

    Raises:
        UserError: there are no runs, one is given twice, one has no results, or their columns differ.
    """
    read = [read_run(Path(folder)) for folder in runs]
    _check(read)
    columns = read[0].results["columns"]
    names = list(dict.fromkeys(row["name"] for run in read for row in run.results["rows"]))
    by_name = {name: [row for run in read for row in run.results["rows"] if row["name"] == name] for name in names}
    rows = [_combined_row(name, by_name[name], columns) for name in names]
    return {
        "task": read[0].results.get("task"),
        "columns": columns,
        "rows": rows,
        "notes": _differences(read) + _gaps(rows, len(read)) + _case_notes(by_name),
    }


def _check(runs: Sequence[Run]) -> None:
    if not runs:
        raise UserError("there are no runs to combine: give the output folders of at least one run")
    folders = [run.folder.resolve() for run in runs]
    if twice := next((run.folder for run in runs if folders.count(run.folder.resolve()) > 1), None):
        raise UserError(f"{twice} is given twice: give each run once")
    for run in runs:
        if not run.results:
            raise UserError(f"{run.folder} has no results.json: evaluate the run first")
        for key in ("task", "columns"):
            one, other = runs[0].results.get(key), run.results.get(key)
            if one != other:
                raise UserError(
                    f"{run.folder} has {key} {other}, {runs[0].folder} has {one}: combine runs of one recipe"
                )


def _combined_row(name: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> dict[str, Any]:
    cases = {row.get("cases") for row in rows}
    metrics = {
        column: spread([row["metrics"][column] for row in rows if row["metrics"].get(column) is not None])
        for column in columns
    }
    return {
        "name": name,
        "metrics": metrics,
        "cases": cases.pop() if len(cases) == 1 else None,
        "n": len(rows),
    }


def spread(values: Sequence[Number]) -> dict[str, Any]:
    """``mean``, sample standard deviation ``sd`` and ``n`` of values; ``None`` where they are too few."""
    number = len(values)
    if number == 0:
        return {"mean": None, "sd": None, "n": 0}
    mean = sum(values) / number
    sd = math.sqrt(sum((value - mean) ** 2 for value in values) / (number - 1)) if number > 1 else None
    return {"mean": mean, "sd": sd, "n": number}


def _differences(runs: Sequence[Run]) -> list[str]:
    """Settings, beside the free ones, in which the runs' recipes differ."""
    flat = [settings(run.recipe) for run in runs]
    keys = sorted({key for one in flat for key in one if not set(_FREE) & set(key.split("."))})
    differing = [key for key in keys if any(one.get(key) != flat[0].get(key) for one in flat)]
    return [f"the recipes differ in {', '.join(differing)}"] if differing else []


def _gaps(rows: Sequence[Mapping[str, Any]], runs: int) -> list[str]:
    notes = [f"{row['name']}: in {row['n']} of {runs} runs" for row in rows if row["n"] != runs]
    notes += [
        f"{row['name']}: {column} in {value['n']} of {row['n']} runs"
        for row in rows
        for column, value in row["metrics"].items()
        if 0 < value["n"] < row["n"]
    ]
    return notes


def _case_notes(by_name: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    cases = {name: sorted({row["cases"] for row in rows if "cases" in row}) for name, rows in by_name.items()}
    return [f"{name}: {found[0]} to {found[-1]} cases" for name, found in cases.items() if len(found) > 1]
