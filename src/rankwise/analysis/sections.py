"""The sections of a run's page, from the results to what its folder lacks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from plotly.graph_objects import Figure

from rankwise.analysis.columns import ABSENT, UNKNOWN, Number, best_rows, describe, mean_of, write_value
from rankwise.analysis.drawing import is_finite, not_finite, summary
from rankwise.analysis.figures import by_stage, curves, rank_heatmap
from rankwise.analysis.history import histories
from rankwise.analysis.markup import Cell, muted, pairs_table, plot, section, table
from rankwise.analysis.runfolder import Run
from rankwise.analysis.tables import cells


def results_section(run: Run) -> str:
    """The table of results, with what each column means; says so where there are none."""
    if not run.results.get("rows"):
        return section("Results", muted("This run has no results: it has not been evaluated."))
    columns = run.results["columns"]
    head, body = cells(run.results)
    rows = [[_result_cell(run, place, at, cell) for at, cell in enumerate(row)] for place, row in enumerate(body)]
    caption = "The best value of each column is bold; a bar's length is the value over the column's largest."
    shown = table(caption, ["", *head[1:]], rows) + _intervals(run.results["rows"])
    return section("Results", shown + definitions(columns, "cases" in head))


def _intervals(rows: Sequence[Mapping[str, Any]]) -> str:
    """The ends of each mean's interval; nothing where the cases are not known one by one."""
    known = [row for row in rows if row.get("intervals")]
    if not known:
        return ""
    names = list(dict.fromkeys(name for row in known for name in row["intervals"]))
    texts = [[row["name"], *(_ends(name, row["intervals"].get(name)) for name in names)] for row in known]
    body: list[list[Cell]] = [[(str(text), "") for text in row] for row in texts]
    return table("95 % intervals of the means, from a bootstrap over the cases.", ["", *names], body)


def _ends(name: str, interval: Sequence[Number] | None) -> str:
    return ABSENT if interval is None else f"{write_value(name, interval[0])} to {write_value(name, interval[1])}"


def _result_cell(run: Run, row: int, at: int, cell: tuple[str, bool]) -> Cell:
    text, best = cell
    columns = run.results["columns"]
    if not 1 <= at <= len(columns):
        return text, ""
    values = [mean_of(one["metrics"].get(columns[at - 1])) for one in run.results["rows"]]
    share = bar_share(values[row], values) if describe(columns[at - 1]).better == "higher" else None
    kinds = "number" + (" bar" if share is not None else "") + (" best" if best else "")
    return text, f' class="{kinds}"' + (f' style="--share:{share:.3f}"' if share is not None else "")


def bar_share(value: Number | None, values: Sequence[Number | None]) -> float | None:
    """Length of a bar that starts at zero, 0..1 of the column's largest value.

    ``None``, for no bar, where the value is absent, or one of the column's is negative or not finite.
    """
    known = [one for one in values if one is not None]
    if value is None or not all(math.isfinite(one) and one >= 0 for one in known) or max(known) == 0:
        return None
    return value / max(known)


def definitions(columns: Sequence[str], cases: bool) -> str:
    """What each column means, one sentence each."""
    pairs = [(name, _definition(name)) for name in columns]
    pairs += [("cases", "number of held-out cases that the row was evaluated on.")] if cases else []
    entries = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in pairs)
    return f'<dl class="definitions">{entries}</dl>'


def _definition(name: str) -> str:
    column = describe(name)
    if column.meaning == UNKNOWN:
        return f"{UNKNOWN} Which way is better is not known, so no value is bold."
    return column.meaning + (" Lower is better." if column.better == "lower" else "")


def curves_section(run: Run) -> str:
    """A figure for each stage's loss; says so where nothing was logged."""
    figures = curves(run.metrics, run.results.get("task"), stage_kinds(run))
    stages = by_stage(run.metrics).values()
    lost = sum(not_finite(lines, key) for lines in stages for key in ("loss", "eval_loss"))
    note = muted(f"Losses that are not finite and so are not drawn: {lost}.") if lost else ""
    if not figures:
        return section("Learning curves", muted("No losses were logged.") + note)
    return section("Learning curves", _plots(figures, "curve") + note)


def _plots(figures: Sequence[Figure], name: str) -> str:
    """Figures side by side."""
    plots = "\n".join(plot(figure, f"{name}-{at}", summary(figure)) for at, figure in enumerate(figures))
    return f'<div class="plots">\n{plots}\n</div>'


def stage_kinds(run: Run) -> dict[str, str]:
    """Kinds of the recipe's stages by name."""
    stages = run.recipe.get("stages")
    named = [one for one in stages if isinstance(one, Mapping)] if isinstance(stages, list) else []
    return {str(one["name"]): str(one["kind"]) for one in named if "name" in one and "kind" in one}


def ranks_section(run: Run) -> str:
    """The heat map of ranks, and every module in a table."""
    figure = rank_heatmap(run.ranks)
    if figure is None:
        gap = "The ranks of this run are not known: there is neither ranks.json nor an adapter."
        return section("Ranks", muted(gap))
    keys = ("rank", "initial_rank", "parameters")
    modules = table(
        "Directions that are not zero, the configured rank, and the parameters stored.",
        ["module", "rank", "configured", "parameters"],
        [[(row["module"], ""), *((_count(row.get(key)), "") for key in keys)] for row in run.ranks],
        foot=["total", *(_count(total(run.ranks, key)) for key in keys)],
    )
    details = f"<details><summary>All {len(run.ranks)} modules</summary>{modules}</details>"
    return section("Ranks", plot(figure, "rank-map", rank_summary(run.ranks)) + details + _export(run))


def history_section(run: Run) -> str:
    """Gates, parameters, threshold and ranks by step; nothing where the adapter has no gates."""
    figures = histories(run.metrics)
    return section("History of ranks", _plots(figures, "history")) if figures else ""


def total(rows: Sequence[Mapping[str, Any]], key: str) -> int | None:
    """Sum of a value over rows; ``None`` where one of them lacks it, or there are none."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return sum(map(int, values)) if rows and len(values) == len(rows) else None


def rank_summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Smallest, largest and sum of the ranks in a sentence."""
    ranks, first = [int(row["rank"]) for row in rows], total(rows, "initial_rank")
    span = f"every rank is {ranks[0]}" if len(set(ranks)) == 1 else f"ranks from {min(ranks)} to {max(ranks)}"
    # An adapter that was trained from a start is exported as the difference of two: twice the rank.
    of = f" of {first:,}" if first is not None and first >= sum(ranks) else ""
    return f"{len(rows)} modules, {span}; {sum(ranks):,}{of} directions."


def _export(run: Run) -> str:
    """How the adapter was exported, where the run tells it."""
    export = run.results.get("export") or {}
    error = export.get("relative_error")
    if not is_finite(error):
        return ""
    layout = f", layout {export['layout']}" if "layout" in export else ""
    return muted(f"Exported as plain LoRA{layout}; relative error of the update {error:.2g}.")


def _count(value: Any) -> str:
    return write_value("parameters", value)


def counts_section(run: Run) -> str:
    """What was dropped or ignored, from the data to the log."""
    title, counts = "Rows and cases", (run.results.get("counts") or {}) | run.unread
    if not counts:
        return section(title, muted("Nothing was counted."))
    caption = "What was read, kept, cut, dropped and left out; what is not named did not occur."
    written = {name: _count(number) for name, number in counts.items() if number}
    return section(title, pairs_table(caption, ["what", "number"], written))


def cost_section(run: Run) -> str:
    """Seconds by stage, and the parameters trained."""
    seconds, parameters = run.results.get("seconds") or {}, total(run.ranks, "parameters")
    body = f"<p>{parameters:,} parameters in the adapter.</p>" if parameters is not None else ""
    if not seconds:
        return section("Cost", body + muted("No times were recorded."))
    times = {name: f"{value:,.1f}" for name, value in seconds.items()}
    foot = ["total", f"{sum(seconds.values()):,.1f}"]
    return section("Cost", body + pairs_table("Time by part of the run.", ["part", "seconds"], times, foot))


def settings_section(run: Run) -> str:
    """The recipe as it was resolved: what to run again."""
    if not run.recipe_text:
        return section("Settings", muted("The run holds no recipe.yaml."))
    text = "The resolved recipe; <code>rankwise train recipe.yaml</code> runs it again."
    recipe = f'<pre tabindex="0" aria-label="recipe.yaml">{escape(run.recipe_text.rstrip())}</pre>'
    return section("Settings", f'<p class="muted">{text}</p>{recipe}')


def versions_section(run: Run) -> str:
    """Versions of what the run stood on."""
    if not run.versions:
        return section("Versions", muted("The run holds no versions.json."))
    written = {name: value if isinstance(value, str) else json.dumps(value) for name, value in run.versions.items()}
    return section("Versions", pairs_table("What the run stood on.", ["name", "version"], written))


def absent_section(run: Run) -> str:
    """What the folder lacks, and why a run ended early; nothing where it is whole."""
    stopped = run.results.get("stopped")
    failed = run.results.get("not_looked_at") or {}
    if not run.absent and not stopped and not failed:
        return ""
    items = [f"<li>{escape(name)} is absent: {escape(gap)}.</li>" for name, gap in run.absent.items()]
    items += [f"<li>evaluation.{escape(name)} failed: {escape(str(reason))}.</li>" for name, reason in failed.items()]
    items += [f"<li>The run was stopped: {escape(str(stopped))}.</li>"] if stopped else []
    return section("Not in this folder", f"<ul>{''.join(items)}</ul>", ' class="notice"')


def lead(run: Run) -> str:
    """The finding in a sentence: the best row by the first column that has one, beside the base model."""
    rows = run.results.get("rows") or []
    for name in run.results.get("columns") or []:
        best = best_rows(name, [row["metrics"].get(name) for row in rows])
        if best:
            written = [escape(write_value(name, row["metrics"].get(name))) for row in rows]
            names = [escape(str(row["name"])) for row in rows]
            base = [at for at in range(len(rows)) if at not in best and "base" in names[at].lower()][:1]
            beside = "".join(f"; {names[at]}: {written[at]}" for at in base)
            first = " and ".join(names[at] for at in sorted(best))
            return f"Best {escape(name)}: <strong>{written[min(best)]}</strong>, {first}{beside}."
    return ""


def facts(run: Run) -> dict[str, str]:
    """The few things to know at first sight, as far as the folder tells them."""
    parameters, seconds = total(run.ranks, "parameters"), run.results.get("seconds") or {}
    found = {
        "task": run.results.get("task"),
        "base model": _named(run.recipe.get("model")),
        "adapter": _named(run.recipe.get("adapter")),
        "adapter parameters": None if parameters is None else f"{parameters:,}",
        "seed": run.recipe.get("seed"),
        "time": f"{sum(seconds.values()):,.0f} s" if seconds else None,
    }
    return {name: str(value) for name, value in found.items() if value is not None}


def _named(value: Any) -> Any:
    """The name of a recipe's part, given as a name or as settings that hold one."""
    if not isinstance(value, Mapping):
        return value
    keys = ("method", "kind", "type", "name", "path")
    return next((value[key] for key in keys if isinstance(value.get(key), str)), None)
