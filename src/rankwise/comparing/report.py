"""A comparison as one page: which method to take first, then tables, figures, settings and how to run it again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rankwise.analysis.drawing import is_finite
from rankwise.analysis.drift_figure import drift_figure, known
from rankwise.analysis.markup import Cell, muted, pairs_table, plot, section, table
from rankwise.analysis.place_tables import HEAD as PLACES_HEAD
from rankwise.analysis.place_tables import MEANING, TITLE, place_figure, place_texts
from rankwise.analysis.report import page
from rankwise.comparing.advice import TESTED, advice, forgotten_metrics, most_frequent, qualified, scored, whole
from rankwise.comparing.figures import cost_figure, forgetting_figure, forgotten, score_figure, search_figure
from rankwise.comparing.overview import Overview, overall, overview_caption, overview_grid, overview_note, overview_of
from rankwise.comparing.tables import caption, grid, lacking, search_note
from rankwise.comparing.training_figures import training_figures
from rankwise.errors import UserError, shown
from rankwise.files import write_text
from rankwise.reading import read_json

SUMMARY, SUMMARY_VERSION = "summary.json", 1
Rows = Sequence[Mapping[str, Any]]


def write_comparison_report(folder: Path) -> Path:
    """Write ``report.html`` from a comparison's ``summary.json``; returns its path.

    Raises:
        UserError: the folder is no finished comparison's.
    """
    path = Path(folder) / SUMMARY
    again = "run `rankwise compare` again"
    try:
        results = read_json(path, dict, again)
        version = results.get("version")
        text = render_comparison(results) if version == SUMMARY_VERSION else ""
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path} is no finished comparison's ({error!r}): {again}") from error
    if version != SUMMARY_VERSION:
        raise UserError(f"{path} is of version {shown(version)}, and this is {SUMMARY_VERSION}: {again}")
    write_text(path.with_name("report.html"), text)
    return path.with_name("report.html")


def render_comparison(results: Mapping[str, Any]) -> str:
    """The page of what ``summary.json`` holds."""
    overview = overview_of(results)
    several = len(overview.tasks) > 1
    body = [_task_section(results, task, own_lead=several) for task in overview.tasks]
    body = [_overview(overview), *body] if several else body
    about = [_cells(results), _settings(results), _versions(results)]
    return page(str(results["name"]), _header(results, overview), [*body, *about])


def _header(results: Mapping[str, Any], overview: Overview) -> str:
    rows, tasks = results["rows"], list(overview.tasks)
    facts = {
        "methods": f"{len({row['method'] for row in rows})}",
        "tasks": f"{len(tasks)}",
        "seeds": f"{len(results['seeds'])}",
        "runs": f"{results['runs']:,}, {len(results['search']):,} of them to choose settings",
    }
    found = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    several = len(tasks) > 1
    leads = _lead(overall(overview)) + muted(overview_note(overview)) if several else _advised(results, tasks[0])
    title = f'<p class="kind">rankwise comparison</p>\n<h1>{escape(str(results["name"]))}</h1>'
    return f'{title}\n{leads}\n<dl class="facts">{found}</dl>'


def _lead(text: str) -> str:
    return f'<p class="lead">{escape(text)}</p>'


def _advised(results: Mapping[str, Any], task: str) -> str:
    tested = muted(TESTED) if len(results["seeds"]) > 1 else ""
    return _lead(" ".join([advice(results, task), *qualified(results, task)])) + tested


def _overview(overview: Overview) -> str:
    head, *texts = overview_grid(overview)
    above = f"{overview_caption(overview)}. A heading sorts."
    shown = table(above, head, [[(text, "") for text in row] for row in texts], kind=" sortable")
    return section("All tasks", shown, anchor="all-tasks")


def _task_section(results: Mapping[str, Any], task: str, own_lead: bool) -> str:
    own, rows, seeds = [row for row in results["rows"] if row["task"] == task], scored(results, task), results["seeds"]
    notes = [*filter(None, [search_note(own)]), *(f"{row['method']}: {row['failed']}" for row in own if row["failed"])]
    anchor = f"task-{task}"  # beside the sections of all pages
    lead = [_advised(results, task)] if own_lead else []
    if not rows:
        return section(task, "".join([*lead, *map(muted, notes)]), anchor=anchor)
    metric, base = rows[0]["metric"], results["base"].get(task) or {}
    head, *texts = grid(own, len(seeds))
    above = f"{caption(own, len(seeds), results['against'])}. A heading sorts."
    parts = [*lead, table(above, head, [[(text, "") for text in row] for row in texts], kind=" sortable")]
    if is_finite(base.get(metric)):
        parts.append(muted(f"Before any training: {metric} {base[metric]:.4g}."))
    if is_finite(label := most_frequent(results, task).get(metric)):
        parts.append(muted(f"The most frequent label of the training rows, always: {metric} {label:.4g}."))
    parts += map(muted, notes)
    words = _score_words(whole(results, task))
    rows = [{**row, "method": _named(row, len(seeds))} for row in rows]
    figures = [plot(score_figure(rows, metric), f"{task}-scores", words)]
    figures.append(plot(cost_figure(rows, metric), f"{task}-cost", _cost_words(rows)))
    if len(rows[0]["metrics"]) > 1:
        parts.append(_metrics_table(rows, base))
    for name in forgotten_metrics(results, task, rows):
        if is_finite(base.get(name)):
            figure = forgetting_figure(rows, metric, name, base[name])
            figures.append(plot(figure, f"{task}-{name}", _forgetting_words(rows, name, base[name])))
    if changed := {row["method"]: row["updates"] for row in rows if row.get("updates")}:
        parts.append(_updates_table(changed))
        figures.append(plot(place_figure(changed), f"{task}-updates", _updates_words(changed)))
    for name in dict.fromkeys(name for row in rows for name in row.get("drift") or {}):
        layers = {row["method"]: row["drift"][name] for row in rows if name in row["drift"]}
        drawn = drift_figure(layers, f"Hidden states of {name}, before and after training")
        figures.append(plot(drawn, f"{task}-drift-{name}", _drift_words(layers)))
    if unknown := [row["method"] for row in rows if not row["curve"]]:
        parts.append(muted(f"Learning curves and ranks by layer are not known of all runs of {', '.join(unknown)}."))
    figures += [plot(drawn, f"{task}-{name}", words) for name, drawn, words in training_figures(rows, metric)]
    search = [row for row in results["search"] if row["task"] == task]
    found = search_figure(search, metric)
    if found is not None:
        figures.append(plot(found, f"{task}-search", _search_words(search)))
    return section(task, "\n".join(parts) + f'\n<div class="plots">{"".join(figures)}</div>', anchor=anchor)


def _named(row: Mapping[str, Any], seeds: int) -> str:
    lacks = lacking(row, seeds)
    return f"{row['method']} ({lacks})" if lacks else row["method"]


def _score_words(whole: Rows) -> str:
    if not whole:
        return "no method has a score of every seed"
    if len(whole) == 1:
        return f"{whole[0]['method']} has {whole[0]['mean']:.4g}"
    first, last = (f"with {whole[at]['mean']:.4g}" for at in (0, -1))
    return f"{whole[0]['method']} is best {first}, {whole[-1]['method']} last {last}"


def _search_words(search: Rows) -> str:
    rounds = len({row["share"] for row in search})
    which = "the search" if rounds == 1 else f"the first of {rounds} rounds of the search"
    seeds = len({row.get("seed") for row in search})  # which comparisons of earlier versions do not say
    means = f", by means over {seeds} seeds" if seeds > 1 else ""
    return f"{which}: settings are chosen on rows held out of the training data{means}"


def _metrics_table(rows: Rows, base: Mapping[str, float]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    found = {row["method"]: row["metrics"] for row in rows} | ({"before training": base} if base else {})
    cells: list[list[Cell]] = [
        [(method, ""), *((_number(metrics.get(name)), "") for name in names)] for method, metrics in found.items()
    ]
    caption = "All that was measured, means over the seeds; losses in nats a token. A heading sorts."
    return table(caption, ["method", *names], cells, kind=" sortable")


def _number(value: Any) -> str:
    return f"{value:.4f}" if is_finite(value) else "-"


def _cost_words(rows: Rows) -> str:
    least, most = (pick(rows, key=lambda row: row["parameters"]) for pick in (min, max))
    return (
        f"{least['method']} trains {least['parameters']:,} parameters, {most['method']} {most['parameters']:,}: "
        f"{least['mean']:.4g} and {most['mean']:.4g}"
    )


def _forgetting_words(rows: Rows, name: str, base: float) -> str:
    measured = [row for row in rows if is_finite(row["metrics"].get(name))]
    least, most = (pick(measured, key=lambda row: forgotten(row, name, base)) for pick in (min, max))
    unit = " nats" if name.endswith(" loss") else ""
    return (
        f"{least['method']} forgets least ({least['metrics'][name] - base:+.4f}{unit}), "
        f"{most['method']} most ({most['metrics'][name] - base:+.4f})"
    )


def _updates_table(changed: Mapping[str, Mapping[str, Any]]) -> str:
    caption = f"{TITLE}: means over modules and seeds. A heading sorts."
    cells: list[list[Cell]] = [
        [(text, "") for text in place_texts(name, {**means, "modules": round(means["modules"])})]
        for name, means in changed.items()
    ]
    note = muted(MEANING.format(rank=round(max(means["rank"] for means in changed.values()))))
    return table(caption, ["method", *PLACES_HEAD], cells, kind=" sortable") + note


def _updates_words(changed: Mapping[str, Mapping[str, Any]]) -> str:
    most = {part: max(changed, key=lambda name: changed[name][part]) for part in ("top", "bottom")}
    parts = [
        f"{name} has most at the {part} ({changed[name][part] / changed[name]['chance']:.3g} times chance)"
        for part, name in most.items()
    ]
    return "; ".join(parts)


def _drift_words(found: Mapping[str, Mapping[str, float | None]]) -> str:
    last = {name: [*known(layers).values()][-1] for name, layers in found.items() if known(layers)}
    if not last:
        return "no layer's states vary"
    least, most = (pick(last, key=lambda name: last[name]) for pick in (min, max))
    return f"in the last layer {least} has drifted most ({last[least]:.3g}), {most} least ({last[most]:.3g})"


def _cells(results: Mapping[str, Any]) -> str:
    """The names by which single runs are run again."""
    named = {f"{row['task']}, {row['method']}": (row.get("cells") or {}).values() for row in results["rows"]}
    rows: list[list[Cell]] = [[(one, ""), (", ".join(names), ' class="names"')] for one, names in named.items()]
    words = (
        "<code>rankwise compare COMPARISON --again NAME</code> runs any single one of them again, to the same number "
        "on the same machine."
    )
    names = f"<details><summary>Their names</summary>{table('A run for each seed.', ['', ''], rows)}</details>"
    return section("Runs", f'<p class="muted">{words}</p>{names}')


def _settings(results: Mapping[str, Any]) -> str:
    text = json.dumps(results["comparison"], indent=2, ensure_ascii=False)
    words = "The comparison as it was run. <code>rankwise compare COMPARISON</code> goes on with it."
    body = f'<p class="muted">{words}</p><pre tabindex="0" aria-label="comparison">{escape(text)}</pre>'
    return section("Settings", body)


def _versions(results: Mapping[str, Any]) -> str:
    written = {str(name): str(value) for name, value in results["versions"].items()}
    words = "What the last rankwise compare stood on; runs that it found finished may stand on other versions."
    notes = [muted(f"Not the same for all runs: {line}.") for line in map(_mixed, (results.get("mixed") or {}).items())]
    return section("Versions", pairs_table(words, ["name", "version"], written) + "".join(notes))


def _mixed(found: tuple[str, Mapping[str, int]]) -> str:
    name, counts = found
    stood = [f"{one} ({runs:,} {'run' if runs == 1 else 'runs'})" for one, runs in counts.items()]
    return f"{name} {', '.join(stood)}"
