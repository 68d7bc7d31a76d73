"""Run one cell in a process of its own, and keep its figures: ``python -m rankwise.comparing.cell_run RECIPE``."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from rankwise.analysis.columns import Number
from rankwise.analysis.drawing import points
from rankwise.analysis.ranks import split_module
from rankwise.analysis.results import read_results
from rankwise.checkpoints.resuming import CHECKPOINTS, REPORT
from rankwise.comparing.cells import VERSION, digest_of
from rankwise.comparing.running import BUSY
from rankwise.errors import Stopped, UserError
from rankwise.files import Damaged, InUse, in_use, remove_folder, to_json, write_json
from rankwise.memory import peak_memory
from rankwise.tasks.files import DataChanged

TRAINED = ("stages", CHECKPOINTS)  # what an unfinished run goes on from; a finished one keeps neither, unless asked to


def run_cell(recipe_file: Path, keep_adapter: bool = False) -> dict[str, Any]:
    """Run a cell's recipe and write its figures beside it.

    A user's mistake (a method that the model cannot carry, a loss that is no number) is a result too, with the rows
    that were measured before: it would occur again.

    A run that was broken off goes on from its last checkpoint.

    Args:
        recipe_file: ``<cell>.yaml``; the run goes to the folder ``<cell>``, and ``<cell>.json`` is written last.
        keep_adapter: whether the stages and the finished adapter stay.

    Returns:
        What was written: ``rows`` and ``columns`` of the results, ``parameters`` that were trained, ``step_seconds``,
        ``seconds``, ``peak_memory`` in bytes (before the updates are looked at; both None of a run that went on, as
        they would be its last process's alone), the last stage's training loss as its ``curve``, ``ranks`` by layer,
        ``threads``, the ``versions`` and the machine that it ended on, ``failed`` with the mistake or None, and
        ``version``; the file has a ``digest`` of it too.

    Raises:
        InUse: another process is at the cell.
        DataChanged: its data are not those that it began with.
        Stopped: the process was asked to end.
    """
    import torch

    from rankwise.recipes import load_recipe
    from rankwise.run import Run
    from rankwise.versions import versions

    recipe = load_recipe(recipe_file)
    folder = Path(recipe.output)
    result = folder.with_name(folder.name + ".json")
    if result.is_file():  # by another command, since this one was told to
        kept: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return kept
    with in_use(folder):
        goes_on = not (folder / REPORT).is_file() and any((folder / name).is_dir() for name in TRAINED)
        if not goes_on:
            _empty(folder)
    started = time.perf_counter()
    found: dict[str, Any] = {"version": VERSION, "failed": None}
    try:
        results = Run(recipe, Console(width=120), resume=True)()
        found |= {name: results[name] for name in ("rows", "columns", "counts", "parameters", "peak_memory")}
        found |= {"export": results["export"]} | {
            name: results.get(name) for name in ("updates", "drift", "not_looked_at")
        }
        found["step_seconds"] = step_seconds(folder / "metrics.jsonl")
        found |= {"curve": loss_curve(folder / "metrics.jsonl"), "ranks": layer_ranks(folder / "ranks.json")}
    except (InUse, DataChanged, Damaged):  # a UserError too, and no result
        raise
    except (UserError, torch.OutOfMemoryError) as mistake:
        found["failed"] = str(mistake)
        with contextlib.suppress(UserError):
            measured = read_results(folder)  # the base, say, which no other cell measures
            found |= {name: measured[name] for name in ("rows", "columns", "counts") if name in measured}
    found |= {"threads": torch.get_num_threads(), "versions": versions()}
    found["seconds"] = round(time.perf_counter() - started, 2)
    found.setdefault("peak_memory", peak_memory())
    if goes_on:
        found |= {"seconds": None, "peak_memory": None}
    kept = json.loads(to_json(found))  # as it will be read
    write_json(result, kept | {"digest": digest_of(kept)})
    if not keep_adapter or found["failed"]:
        for name in (*TRAINED, "adapter"):
            remove_folder(folder / name)
    return found


def _empty(folder: Path) -> None:
    """Remove what is in a run's folder: first what it would go on from."""
    for name in TRAINED:
        remove_folder(folder / name)
    for path in folder.iterdir():
        if path.is_dir():
            remove_folder(path)
        else:
            path.unlink()


def step_seconds(metrics: Path) -> float | None:
    """Mean time of an optimizer step of the last stage, as the trainer measured it; None where it was not."""
    ends = [line for line in _lines(metrics) if line.get("train_runtime") and line.get("steps_timed")]
    return ends[-1]["train_runtime"] / ends[-1]["steps_timed"] if ends else None


def loss_curve(metrics: Path) -> list[list[Number]]:
    """Each logged step of the last stage with its training loss."""
    lines = _lines(metrics)
    return [[*point] for point in points([line for line in lines if line["stage"] == lines[-1]["stage"]], "loss")]


def layer_ranks(ranks: Path) -> dict[str, int]:
    """Directions of each layer's modules together; none where the run has no ranks."""
    found: dict[str, int] = {}
    for row in json.loads(ranks.read_text(encoding="utf-8")) if ranks.is_file() else ():
        layer, _ = split_module(row["module"])
        found[layer] = found.get(layer, 0) + row["rank"]
    return found


def _lines(metrics: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    try:
        run_cell(Path(sys.argv[1]), sys.argv[2:] == ["--keep"])
    except (InUse, DataChanged, Stopped) as reason:
        print(reason)
        sys.exit(BUSY if isinstance(reason, InUse) else 1)
