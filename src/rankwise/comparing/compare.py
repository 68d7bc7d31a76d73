"""Run a comparison: settings are chosen, reported runs are run, and the tables and the report are written."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rankwise.analysis.drawing import is_finite
from rankwise.comparing.cells import CELLS, Cell, Setting, make_cell, settings
from rankwise.comparing.choosing import Key, choose, deciding_metric
from rankwise.comparing.formats import latex, markdown, terminal_tables
from rankwise.comparing.report import SUMMARY, SUMMARY_VERSION, write_comparison_report
from rankwise.comparing.running import run_cells
from rankwise.comparing.summary import (
    RUNS,
    earlier_runs,
    means,
    restore,
    run_rows,
    summarise,
    write_runs,
)
from rankwise.errors import UserError, naming
from rankwise.files import clear_unfinished, write_json, write_text
from rankwise.models import context_limit, load_tokenizer
from rankwise.saying import say
from rankwise.schema import Comparison, Recipe
from rankwise.tasks.files import check_recipe_files
from rankwise.tasks.load import load_task
from rankwise.versions import mixed, versions

EVERY = 60.0  # seconds, at least, between two writings of the runs while they go on


def compare(comparison: Comparison, console: Console, cluster: bool = False) -> dict[str, Any]:
    """Run what is not finished of a comparison, and write ``runs.parquet``, ``summary.json``, tables and the report.

    Args:
        comparison: what to compare.
        console: shows progress and the tables.
        cluster: see :func:`rankwise.comparing.running.run_cells`.

    Where the folder has no cells but a ``runs.parquet``, those of that file are taken as finished.

    Returns:
        What ``summary.json`` holds: ``name``, ``rows`` (see :func:`rankwise.comparing.summary.summarise`) and ``runs``,
        how many there were.

    Raises:
        UserError: a task is not possible with a method, a file is missing, or a run ended without a result.
    """
    check(comparison)
    check_metrics(comparison)
    folder = Path(comparison.output)
    for place in (folder, folder / CELLS):
        clear_unfinished(place)
    if restored := restore(folder):
        say(console, f"{restored} runs are finished in {folder / RUNS}")
    (folder / CELLS).mkdir(parents=True, exist_ok=True)
    earlier = earlier_runs(folder)
    cells: list[Cell] = []
    written = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:

        def run(wanted: Sequence[Cell], what: str = "search") -> None:
            cells.extend(wanted)
            bar = progress.add_task(what, total=len(wanted))
            keep = comparison.keep == "adapters"

            def told(_: Cell) -> None:
                nonlocal written
                progress.advance(bar)
                if time.monotonic() - written > EVERY:  # a process may be ended without notice
                    write_runs(folder, run_rows(comparison, cells), earlier)
                    written = time.monotonic()

            run_cells(wanted, comparison.processes, keep, told, cluster)

        try:
            chosen = choose(comparison, run)
            run(final_cells(comparison, chosen), "seeds")
            earlier = None  # all that belongs to it is there
        finally:  # also of a comparison that is broken off
            rows = run_rows(comparison, cells)
            write_runs(folder, rows, earlier)
    found, reported = summarise(comparison, rows, chosen), [row for row in rows if row["part"] == "final"]
    results = {
        "version": SUMMARY_VERSION,
        "name": comparison.name,
        "against": comparison.baseline,
        "seeds": comparison.seeds,
        "rows": found,
        "runs": len(rows),
        "search": _searched(rows),
        "base": _by_task(reported, "base"),
        "frequent": _by_task(reported, "frequent"),
        "comparison": comparison.model_dump(mode="json"),
        "versions": versions(),
        "mixed": mixed(row["versions"] for row in rows),
    }
    write_json(folder / SUMMARY, results)
    write_text(folder / "table.md", markdown(results))
    write_text(folder / "table.tex", latex(results))
    for table in terminal_tables(results):
        console.print(table)
    _tell_failures(found, rows, folder / CELLS, console)
    say(console, f"runs: {folder / 'runs.parquet'}; tables: {folder / 'table.md'}, table.tex")
    say(console, f"report: {write_comparison_report(folder)}")
    return results


def _tell_failures(
    found: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], cells: Path, console: Console
) -> None:
    """A line for each method that failed on a task, one for the search, and what can be done."""
    lines = [f"{row['task']}, {row['method']}: {row['failed']}" for row in found if row["failed"]]
    if lost := [f"{row['run']}: {row['failed']}" for row in rows if row["part"] == "search" and row["failed"]]:
        lines.append(f"{len(lost)} runs of the search failed, and lost; the first: {lost[0]}")
    if lines:
        hint = "what failed is not tried again, unless its .json is removed from"
        lines.append(f"{hint} {cells}: do so where the cause has passed (no network, no memory left)")
    for line in lines:
        say(console, f"  {line}", dim=True)


def _by_task(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, dict[str, float | None]]:
    """Each task's metrics without training; means over the seeds, as the methods' are: seeds may draw other rows."""
    found: dict[str, list[Mapping[str, float]]] = {}
    for row in rows:
        found.setdefault(row["task"], []).append(row[name])
    return {task: means(metrics) for task, metrics in found.items() if any(metrics)}


def _searched(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the search measured, a row a run."""
    names = ("task", "method", "learning_rate", "rank", "budget", "seed", "share", "value")
    searched = [{name: row[name] for name in names} for row in rows if row["part"] == "search"]
    return [row | {"value": row["value"] if is_finite(row["value"]) else None} for row in searched]


def check(comparison: Comparison) -> None:
    """See that each task's recipe is possible with each method, and that its files exist, before any run.

    Raises:
        UserError: one is not.
    """
    for task in comparison.tasks:
        recipes = {}
        for entry in comparison.methods:
            tried = settings(comparison, entry)
            parts = ("search", "final") if len(tried) > 1 else ("final",)
            for part in parts:
                cell = make_cell(comparison, task, entry, tried[0], comparison.seeds[0], 1.0, part)
            check_recipe_files(cell.recipe)
            recipes[entry.name] = cell.recipe
        _check_same_texts(task, recipes)
    folder = Path(comparison.output)
    own = (folder / CELLS).is_dir() or (folder / RUNS).is_file()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not own):
        raise UserError(f"output {folder} holds something other than a comparison: give a new folder")


def _check_same_texts(task: str, recipes: Mapping[str, Recipe]) -> None:
    """See that all methods, by name, have the same rows of texts, which are packed to the context.

    Raises:
        UserError: virtual tokens would leave some of them other rows.
    """
    recipe = next(iter(recipes.values()))
    kinds = [data.kind for data in (recipe.data, *recipe.evaluation.tasks.values())]
    if recipe.model.context is not None or not (recipe.evaluation.texts or "text" in kinds):
        return
    virtual = {recipe.virtual_tokens: name for name, recipe in recipes.items()}
    if len(virtual) > 1:
        raise UserError(
            f"tasks.{task}: {virtual[max(virtual)]} would have shorter rows of text than other methods, by its "
            f"{max(virtual)} virtual tokens: give shared.model.context, {max(virtual)} or more below the model's limit"
        )


def check_metrics(comparison: Comparison) -> None:
    """See that the metrics that are to decide are measured, in the search too; the data of their tasks are read for it.

    What the search measures, the reported runs do too.

    Raises:
        UserError: one is not.
    """
    searched = [entry for entry in comparison.methods if len(settings(comparison, entry)) > 1]
    entry, part = (searched[0], "search") if searched else (comparison.methods[0], "final")
    setting = settings(comparison, entry)[0]
    for task in comparison.metrics:
        recipe = make_cell(comparison, task, entry, setting, comparison.seeds[0], 1.0, part).recipe
        tokenizer = load_tokenizer(recipe.model.path)
        context = context_limit(recipe.model, tokenizer, recipe.virtual_tokens)
        columns = load_task(recipe, tokenizer, context).columns
        with naming("in the search, which measures the task alone") if searched else nullcontext():
            deciding_metric(comparison, task, columns)


def final_cells(comparison: Comparison, chosen: dict[Key, Setting]) -> list[Cell]:
    """The runs that are reported: all epochs, every seed."""
    return [
        make_cell(comparison, task, entry, chosen[task, entry.name], seed, 1.0, "final")
        for task in comparison.tasks
        for seed in comparison.seeds
        for entry in comparison.methods
    ]
