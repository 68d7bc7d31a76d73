"""The cells of a comparison: which run each is, and what it keeps."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from rankwise.analysis.results import check_rows
from rankwise.errors import UserError, shown
from rankwise.reading import read_json
from rankwise.recipes import make_recipe
from rankwise.schema import METHODS, Comparison, MethodEntry, Recipe

VERSION = 1  # of what a finished cell keeps
CELLS = "cells"
RANKED = ("lora", "milora", "sora", "adalora", "allocating_lora")


@dataclass(frozen=True)
class Setting:
    """A learning rate, and a rank and a budget where these are tried."""

    learning_rate: float
    rank: int | None = None
    budget: float | None = None

    @property
    def adapter(self) -> dict[str, Any]:
        """What it sets in the adapter section."""
        found = {"r": self.rank, "target_ratio": self.budget}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def text(self) -> str:
        """As a part of file names."""
        parts = [f"{self.learning_rate:g}"]
        parts += [f"r{self.rank}"] if self.rank is not None else []
        parts += [f"budget{self.budget:g}"] if self.budget is not None else []
        return "-".join(parts)


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        task: its name.
        method: the entry's name.
        setting: learning rate, rank and budget.
        seed: of the run.
        share: of the task's epochs.
        part: ``search`` on held-out training data, or ``final``.
        recipe: of the run, its output within the comparison's folder.
    """

    task: str
    method: str
    setting: Setting
    seed: int
    share: float
    part: Literal["search", "final"]
    recipe: Recipe

    @property
    def folder(self) -> Path:
        """Of the run; beside it lie its recipe (``.yaml``), its figures (``.json``) and its log (``.log``)."""
        return Path(self.recipe.output)

    def beside(self, suffix: str) -> Path:
        """A file beside the run's folder."""
        return self.folder.with_name(self.folder.name + suffix)

    def result(self) -> dict[str, Any] | None:
        """What the finished run keeps; None where it is not finished.

        Raises:
            UserError: the file is of another version, or no result.
        """
        path = self.beside(".json")
        return read_result(path) if path.is_file() else None


def read_result(path: Path) -> dict[str, Any]:
    """What a finished run keeps.

    Raises:
        UserError: the file is of another version, or no result.
    """
    result: dict[str, Any] = read_json(path, dict, "remove it to run the cell again")
    version = result.get("version")
    if version != VERSION:
        raise UserError(
            f"{path} is of version {shown(version)}, and this is {VERSION}: give a new output, or remove it to run "
            "again"
        )
    if result.get("digest", digest_of(result)) != digest_of(result):  # runs from before it was kept have none
        raise UserError(f"{path} is not as it was written: remove it to run the cell again")
    if not result.get("failed"):
        check_rows(path, result, "remove it to run the cell again")
    return result


def digest_of(result: Mapping[str, Any]) -> str:
    """A hash of what a finished run keeps, but for the digest itself."""
    text = json.dumps({name: value for name, value in result.items() if name != "digest"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def settings(comparison: Comparison, entry: MethodEntry) -> list[Setting]:
    """Everything that is tried for a method."""
    ranks: list[int | None] = [*(entry.ranks or (comparison.ranks if _has_rank(entry) else []))] or [None]
    budgets: list[float | None] = [*(entry.budgets or (comparison.budgets if entry.has_budget else []))] or [None]
    return [Setting(*one) for one in product(entry.learning_rates or comparison.learning_rates, ranks, budgets)]


def _has_rank(entry: MethodEntry) -> bool:
    """Whether the method's rank is to be tried: where it has one of LoRA's kind, and the entry does not set it."""
    return _is_lora(entry) and "r" not in entry.adapter


def _is_lora(entry: MethodEntry) -> bool:
    """Whether the method is of LoRA's kin."""
    return METHODS[entry.kind].settings["kind"] in RANKED


def make_cell(
    comparison: Comparison, task: str, entry: MethodEntry, setting: Setting, seed: int, share: float, part: str
) -> Cell:
    """The cell of a method with a setting on a task.

    Raises:
        UserError: the task's recipe is not possible with this method, or has nothing to choose settings by.
    """
    values: dict[str, Any] = copy.deepcopy({**comparison.shared, **comparison.tasks[task]})
    where = f"tasks.{task} with {entry.name}"
    for key in ("adapter", "seed", "output"):
        if key in values:
            raise UserError(f"tasks.{task}.{key} {values[key]!r}: the comparison sets it: leave it out")
    values["adapter"] = {**entry.adapter, **setting.adapter}
    values |= {"seed": seed, "output": "-", "name": f"{task}, {entry.name}"}
    values["stages"] = _stages(values.get("stages"), setting.learning_rate, share, where)
    evaluation = values.get("evaluation") or {}
    if not isinstance(evaluation, dict):
        raise UserError(f"tasks.{task}.evaluation {evaluation!r} is no mapping: give it keys of a recipe's evaluation")
    if part == "search":
        values["data"] = _held_out(values.get("data"), evaluation, where)
        evaluation |= {"split": "validation", "base": False, "baselines": [], "noise": [], "texts": {}}
        evaluation |= {"tasks": {}, "updates": None, "drift": None, "training_cases": None}
        values["data"].pop("others", None)
    elif entry.name != comparison.methods[0].name:
        evaluation |= {"base": False, "baselines": []}  # the same for all: measured beside the first
    if not _is_lora(entry) and METHODS[entry.kind].settings["kind"] not in ("vera", "full"):
        evaluation |= {"updates": None}  # these are looked at where they are changes of matrices
    values["evaluation"] = evaluation
    recipe = make_recipe(values, source=where)
    name = "-".join(
        [task, entry.name, setting.text, f"seed{seed}", *([f"search{share:g}"] if part == "search" else [])]
    )
    digest = hashlib.sha256(_identity(recipe).encode()).hexdigest()[:8]
    output = str(Path(comparison.output) / CELLS / f"{name}-{digest}")
    placed = make_recipe({**values, "output": output}, source=where)
    return Cell(task, entry.name, setting, seed, share, "search" if part == "search" else "final", placed)


def _identity(recipe: Recipe) -> str:
    """What a cell depends on: all that is not as by default, so that settings which come later leave it finished.

    A default that changes makes other cells of the same name: raise ``VERSION`` then.
    """
    found = recipe.model_dump(mode="json", exclude_defaults=True)
    found["adapter"] = {"kind": recipe.adapter.kind, **found.get("adapter", {})}  # by default its own
    return json.dumps(found, sort_keys=True)


def _stages(stages: Any, rate: float, share: float, where: str) -> list[Any]:
    """The task's stages, the last with this learning rate and share of its epochs."""
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise UserError(f"{where}: stages are missing: give the task, or shared, a list of them")
    last = stages[-1]
    epochs = last.get("epochs", 1.0)
    if not isinstance(epochs, int | float):
        raise UserError(f"{where}: epochs {epochs!r} of the last stage is no number")
    return [*stages[:-1], last | {"learning_rate": rate, "epochs": share * float(epochs)}]


def _held_out(data: Any, evaluation: dict[str, Any], where: str) -> dict[str, Any]:
    """The data with something held out to choose by, apart from what is reported.

    Raises:
        UserError: what is reported would be chosen on.
    """
    if not isinstance(data, dict):
        raise UserError(f"{where}: data are missing: give the task, or shared, a data section")
    if data.get("kind") == "glue":
        if data.get("measure") == "holdout":
            raise UserError(f"{where}: data.measure holdout is what settings are chosen by: leave it out")
        return data | {"measure": "holdout"}
    if data.get("kind") in ("interactions", "sdpo"):
        if evaluation.get("split") == "validation":
            raise UserError(f"{where}: evaluation.split validation is what settings are chosen by: leave it out")
        if data.get("split") == "users":
            raise UserError(f"{where}: data.split users deals them out anew for each seed: take last or time")
        return dict(data)
    if data.get("validation") is None:
        raise UserError(
            f"{where}: data.validation is missing: settings are chosen on a share of train, and the result is measured "
            "on the validation file, which must be another"
        )
    return data | {"validation": None}
