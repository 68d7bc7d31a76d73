"""Open a finished run again: measure its adapter, or export it in another form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from rich.console import Console

from rankwise.adapters import load_adapter_folder
from rankwise.analysis.ranks import CONFIG
from rankwise.analysis.results import read_results
from rankwise.analysis.tables import result_table
from rankwise.errors import UserError, nearest
from rankwise.exporting import ExportReport, Layout, check_export, export
from rankwise.files import write_json
from rankwise.measuring import measured, measured_row, not_numbers
from rankwise.methods import load_stage, with_adapter
from rankwise.models import (
    context_limit,
    load_classifier,
    load_language_model,
    load_sequence_model,
    load_tokenizer,
    quiet_libraries,
)
from rankwise.recipes import load_recipe
from rankwise.saying import say
from rankwise.schema import ClassificationData, GlueData, Recipe, SequenceData
from rankwise.tasks.files import check_recipe_files
from rankwise.tasks.load import held_out_elsewhere, load_task
from rankwise.tokenise import padding_token


def evaluate_run(run: Path, overrides: Sequence[str], console: Console) -> dict[str, Any]:
    """Measure what a run's last stage left on its data, with overrides of the recipe; writes ``evaluation.json``.

    Raises:
        UserError: the folder is no finished run, or its data is gone.
    """
    recipe = open_run(run, overrides)
    check_recipe_files(recipe)
    tokenizer = load_tokenizer(recipe.model.path)
    context = context_limit(recipe.model, tokenizer, recipe.virtual_tokens)
    task, texts = load_task(recipe, tokenizer, context), held_out_elsewhere(recipe, tokenizer, context)
    stage = _last_stage(run, recipe)
    model = _trained(run, recipe, stage)
    rows = [measured_row(name, measure(), task.cases) for name, measure in task.baselines().items()]
    rows.append(measured(task, model, stage, recipe, texts=texts))
    columns, counts = [*task.columns, *texts.columns], {**task.counts, **texts.counts}
    for row in rows:
        counts |= not_numbers(row)
    results = {"task": task.kind, "columns": columns, "rows": rows, "counts": counts}
    write_json(run / "evaluation.json", results)
    console.print(result_table(results))
    return results


def export_folder(
    source: Path,
    folder: Path,
    console: Console,
    *,
    rank: int | None,
    energy: float | None,
    layout: str | None = None,
    stage: str | None = None,
    model: str | None = None,
) -> dict[str, Any]:
    """Export the adapter of a run's stage (the last where none is named), or of an adapter's own folder.

    Args:
        source: a run's folder, or one that ``save_pretrained``, a trainer or ``rankwise init`` wrote.
        folder: where it goes.
        console: where it is told.
        rank: as in :func:`rankwise.export`, like ``energy`` and ``layout``.
        energy: as above.
        layout: as above; if None, uniform for an adapter's folder or a cut one, else that of the run's recipe.
        stage: of a run.
        model: the base of an adapter's folder, where it is another than the one that the adapter names.

    Raises:
        UserError: what :func:`rankwise.export` refuses, the source is neither, there is no such stage, or the base
            cannot be loaded.
    """
    if (source / "recipe.yaml").is_file():
        if model is not None:
            raise UserError(f"the base of a run is in its recipe, and {source} is a run: leave --model out")
        recipe = open_run(source)
        load, usual = partial(trained_stage, source, recipe, stage), recipe.export.layout
    elif (source / CONFIG).is_file():
        if stage is not None:
            raise UserError(f"stage {stage!r} is of a run, and {source} is an adapter: leave --stage out")
        load, usual = partial(load_adapter_folder, source, model), "uniform"
    else:
        raise UserError(
            f"{source} has no recipe.yaml and no {CONFIG}: give the folder of a finished `rankwise train`, or an "
            "adapter's"
        )
    form = cast(Layout, layout or ("uniform" if rank or energy else usual))
    check_export(rank, energy, form, folder)  # before the base is loaded
    report = export(load(), folder, rank, energy, form)
    print_export(folder, report, console)
    return asdict(report)


def trained_stage(run: Path, recipe: Recipe, stage: str | None = None) -> PeftModel:
    """The base with the adapter as a stage of a run left it, the last finished one where none is named.

    Raises:
        UserError: there is no such stage.
    """
    names = [known.name for known in recipe.stages]
    if stage is not None and stage not in names:
        raise UserError(f"stage {stage!r} is not in {run}: {nearest(stage, names)}")
    return _trained(run, recipe, stage or _last_stage(run, recipe))


def _last_stage(run: Path, recipe: Recipe) -> str:
    """The last finished stage: a run whose thresholds closed every gate has not all of them."""
    finished = {row["name"] for row in read_results(run).get("rows", [])}
    names = [stage.name for stage in recipe.stages]
    return next((name for name in reversed(names) if name in finished), names[-1])


def print_export(folder: Path, report: ExportReport, console: Console) -> None:
    """Print what was written: its size, the error of the whole, and the layers where it is largest."""
    error = f"relative error {report.relative_error:.2e}"
    say(console, f"{folder}: {report.parameters:,} parameters, {error}")
    say(console, f"largest of {len(report.module_errors)} modules:")
    for name, value in report.worst():
        say(console, f"  {name} {value:.2e}")


def open_run(run: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a finished run, with overrides.

    Raises:
        UserError: the folder is no run.
    """
    quiet_libraries()
    return load_recipe(_existing(run, "recipe.yaml"), overrides)


def _trained(run: Path, recipe: Recipe, stage: str) -> PeftModel:
    """The base with the adapter as a stage left it."""
    folder = _existing(run, f"stages/{stage}")
    if isinstance(recipe.data, ClassificationData | GlueData):
        labels = read_results(run).get("labels") or []
        padding = padding_token(load_tokenizer(recipe.model.path))
        model = with_adapter(load_classifier(recipe.model, labels, padding), recipe, "SEQ_CLS", folder)
    elif isinstance(recipe.data, SequenceData):
        model = with_adapter(load_sequence_model(recipe.model), recipe, "SEQ_2_SEQ_LM", folder)
    else:
        model = with_adapter(load_language_model(recipe.model), recipe, "CAUSAL_LM", folder)
    load_stage(model, folder)
    return model


def _existing(run: Path, name: str) -> Path:
    if not (run / name).exists():
        raise UserError(f"{run} has no {name}: give the folder of a finished `rankwise train`")
    return run / name
