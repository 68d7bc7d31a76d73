"""Open a finished run again: measure its adapter, or export it in another form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from rich.console import Console

from rankwise.analysis.tables import result_table
from rankwise.errors import UserError, nearest
from rankwise.exporting import Layout, export
from rankwise.files import write_json
from rankwise.models import context_limit, load_tokenizer, quiet_libraries
from rankwise.recipes import load_recipe
from rankwise.run import load_stage, with_adapter
from rankwise.schema import Recipe
from rankwise.tasks.load import check_files, load_task
from rankwise.tasks.task import Task


def evaluate_run(run: Path, overrides: Sequence[str], console: Console) -> dict[str, Any]:
    """Measure a run's finished adapter on its data, with overrides of the recipe; writes ``evaluation.json``.

    Raises:
        UserError: the folder is no finished run, or its data is gone.
    """
    recipe, task = _open(run, overrides)
    base = task.load_model()
    model = PeftModel.from_pretrained(base, _existing(run, run / "adapter"))
    rows = [{"name": name, "metrics": metrics, "cases": task.cases} for name, metrics in task.baselines().items()]
    rows.append({"name": recipe.name, "metrics": task.evaluate(model), "cases": task.cases})
    results = {"task": task.kind, "columns": list(task.columns), "rows": rows, "counts": task.counts}
    write_json(run / "evaluation.json", results)
    console.print(result_table(results))
    return results


def export_stage(
    run: Path, folder: Path, console: Console, *, stage: str | None, rank: int | None, energy: float | None, layout: str
) -> dict[str, Any]:
    """Export the adapter of one stage of a run (the last where none is named) as :func:`rankwise.export` does.

    Raises:
        UserError: the folder is no run, or there is no such stage.
    """
    recipe, task = _open(run, ())
    names = [known.name for known in recipe.stages]
    if stage is not None and stage not in names:
        raise UserError(f"stage {stage!r} is not in {run}: {nearest(stage, names)}")
    trained = _existing(run, run / "stages" / (stage or names[-1]))
    model = with_adapter(task.load_model(), recipe, task.task_type)
    load_stage(model, trained)
    report = export(model, folder, rank, energy, cast(Layout, layout))
    console.print(
        f"{folder}: {report.parameters:,} parameters, relative error {report.relative_error:.2e}", highlight=False
    )
    return asdict(report)


def _open(run: Path, overrides: Sequence[str]) -> tuple[Recipe, Task]:
    quiet_libraries()
    recipe = load_recipe(_existing(run, run / "recipe.yaml"), overrides)
    check_files(recipe.data)
    tokenizer = load_tokenizer(recipe.model.path)
    return recipe, load_task(recipe, tokenizer, context_limit(recipe.model.path, recipe.model.context))


def _existing(run: Path, path: Path) -> Path:
    if not path.exists():
        raise UserError(f"{run} has no {path.relative_to(run)}: give the folder of a finished `rankwise train`")
    return path
