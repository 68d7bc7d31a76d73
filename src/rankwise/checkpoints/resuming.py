"""What a run's folder holds of an earlier run, and where that goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.trainer_utils import get_last_checkpoint

from rankwise.analysis.results import read_results
from rankwise.analysis.runfolder import read_entry
from rankwise.errors import UserError
from rankwise.files import UNFINISHED, check_folder, check_output, remove_folder, write_jsonl
from rankwise.reading import read_json
from rankwise.recipes import load_recipe
from rankwise.saying import say
from rankwise.schema import Recipe
from rankwise.versions import PLACE, differing

CHECKPOINTS = "checkpoints"
VERSIONS = "versions.json"
REPORT = "report.html"  # written last: a run that has one is finished
UNIMPORTANT = {"output", "log_to", "checkpoint_seconds"}  # these may change while a run is unfinished


def earlier_results(folder: Path, recipe: Recipe, again: bool = False) -> dict[str, Any]:
    """Results of an unfinished run of the same recipe, nothing where there was none.

    Args:
        folder: of the run.
        recipe: what is to be run.
        again: whether a finished run is gone on with too.

    Raises:
        UserError: it is a file or cannot be made, or holds something else, a run of another recipe, or a finished run.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output {folder} is a file: give a folder that is new or empty")
    if not folder.is_dir():
        check_output(folder)
        return {}
    if all(path.match(f".*.{UNFINISHED}") for path in folder.iterdir()):
        return {}
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"output {folder} is not empty: give another folder (output=...), or remove it first")
    if not _is_run_of(folder / "recipe.yaml", recipe):
        raise UserError(
            f"output {folder} holds another run: give another folder (output=...), or remove it first; an unfinished "
            "run goes on with its own recipe.yaml and no changes"
        )
    if (folder / REPORT).is_file() and not again:
        raise UserError(
            f"output {folder} holds this run, finished: give another folder (output=...), or remove it first; --resume "
            "writes its adapter and report once more"
        )
    return read_results(folder)


def _is_run_of(file: Path, recipe: Recipe) -> bool:
    """Whether the recipe in a file is the same, but for what changes no result."""
    try:
        found = load_recipe(file)
    except UserError:  # of another version, say
        return False
    return found.model_dump(exclude=UNIMPORTANT) == recipe.model_dump(exclude=UNIMPORTANT)


def changed_versions(folder: Path, now: Mapping[str, str]) -> list[str]:
    """Which versions an unfinished run was begun with that are others now, in words."""
    path = folder / VERSIONS
    if not path.is_file():
        return []
    before = read_json(path, dict, "remove it")
    return [
        f"{name} was {then} when this run was last begun, and is {version} now"
        for name, (then, version) in differing(before, now).items()
        if name not in PLACE
    ]


def checkpoints_of(folder: Path, stage: str) -> Path:
    """Where the checkpoints of a stage of a run lie."""
    return folder / CHECKPOINTS / stage


def whole_checkpoint(folder: Path, stage: str, console: Console) -> Path | None:
    """The last checkpoint of a stage that was not finished, None where there is none; damaged ones are removed."""
    home = checkpoints_of(folder, stage)
    while home.is_dir() and (last := get_last_checkpoint(home)) is not None:
        try:
            check_folder(Path(last), whole=True)
            return Path(last)
        except UserError as error:
            say(console, f"  {error}; this checkpoint is removed")
            remove_folder(Path(last))
    return None


def forget_after(lines: Path, stage: str, step: int = 0) -> list[int]:
    """Drop what a stage logged after a step, all if it is 0, and at its end; the file's last line may be half a line.

    Returns:
        The steps of the stage's lines that are left.
    """
    if not lines.exists():
        return []
    entries = (read_entry(line) for line in lines.read_text(encoding="utf-8", errors="replace").split("\n"))
    others_and_before = [
        entry
        for entry in entries
        if entry is not None
        and (entry.get("stage") != stage or (0 < entry.get("step", 0) <= step and "train_runtime" not in entry))
    ]
    write_jsonl(lines, others_and_before)
    return [entry["step"] for entry in others_and_before if entry.get("stage") == stage]
