"""Steps whose loss or gradient is no number."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor

import rankwise.run
import small_runs
from rankwise.analysis.results import read_results
from rankwise.checkpoints.finite import FiniteTrainer
from rankwise.checkpoints.resuming import checkpoints_of
from rankwise.errors import UserError
from rankwise.run import Run
from rankwise.training import SKIPPED

SHORT = small_runs.SFT | {"batch_size": 2, "epochs": 1, "warmup": 0.0}
DPO = small_runs.DPO | {"start": None, "batch_size": 4, "negatives": 2, "warmup": 0.0}
ADALORA = {"kind": "adalora", "r": 2, "initial_rank": 4, "warmup_share": 0.1, "final_share": 0.3}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("instructions", {"stages": [SHORT]}),
    "accumulated": ("instructions", {"stages": [SHORT | {"accumulation": 3}]}),
    "sora": ("classification", {"stages": [SHORT | {"batch_size": 4}]}),
    "adalora": ("instructions", {"adapter": ADALORA, "stages": [SHORT]}),
    "softmax-DPO": (
        "preferences",
        {"stages": [small_runs.DPO | {"start": None, "batch_size": 4, "negatives": 2, "warmup": 0.0}]},
    ),
}


def poison(monkeypatch: pytest.MonkeyPatch, what: str, call: int) -> list[dict[str, Tensor]]:
    """A batch whose loss, or the gradient of whose loss, is no number; the trained weights before each step."""
    seen: list[dict[str, Tensor]] = []
    exact, look = FiniteTrainer.training_step, FiniteTrainer.look
    calls: list[int] = []

    def training_step(self: FiniteTrainer, model: Any, inputs: Any, *args: Any) -> Tensor:
        loss = exact(self, model, inputs, *args)
        calls.append(1)
        if len(calls) != call:
            return loss
        if what == "gradient":
            next(weight for weight in model.parameters() if weight.grad is not None).grad[0] = math.inf
            return loss
        self._seen[-1] = (inputs, loss * float(what))
        return self._seen[-1][1] if self.on_nan == "stop" else loss

    def looking(self: FiniteTrainer, model: Any) -> None:
        seen.append(
            {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
        )
        look(self, model)

    monkeypatch.setattr(FiniteTrainer, "training_step", training_step)
    monkeypatch.setattr(FiniteTrainer, "look", looking)
    return seen


@pytest.mark.parametrize("what", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_stops_the_training_with_its_rows_before_a_weight_changes(
    kind: str, what: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, changes = KINDS[kind]
    recipe = small_runs.recipe(name, tmp_path, model_folder, checkpoint_seconds=0.0, **changes)
    poison(monkeypatch, what, 8 if kind == "accumulated" else 3)
    words = f"the loss is {what}" if what != "gradient" else r"the gradient's norm is (nan|inf)"
    where = r"at step 3, on rows \d+ \(\.\.\. '.+'\), .* of those that are trained on: lower the stage's"
    with pytest.raises(UserError, match=rf"{words} {where} .*, and the last checkpoint is .*checkpoint-2$"):
        Run(recipe, small_runs.silent())()
    checkpoints = checkpoints_of(Path(recipe.output), recipe.stages[0].name)
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-2"]


@pytest.mark.parametrize("what", ["nan", "gradient"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_can_be_left_out_and_counted(
    kind: str, what: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, changes = KINDS[kind]
    stages = [dict(changes["stages"][0]) | {"on_nan": "skip"}]
    recipe = small_runs.recipe(name, tmp_path, model_folder, **(changes | {"stages": stages}))
    weights = poison(monkeypatch, what, 8 if kind == "accumulated" else 3)
    results = Run(recipe, small_runs.silent())()
    assert results["counts"][f"{recipe.stages[0].name}: {SKIPPED}"] == 1
    same = [all(torch.equal(one[name], two[name]) for name in one) for one, two in pairwise(weights)]
    assert [number for number, unchanged in enumerate(same, 1) if unchanged] == [3]
    lines = (Path(recipe.output) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(math.isfinite(line["loss"]) for line in map(json.loads, lines) if "loss" in line)


def test_the_rows_are_those_of_the_batch(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small_runs.recipe("instructions", tmp_path, model_folder, stages=[SHORT])
    batches: list[list[int]] = []
    exact: Callable[..., Tensor] = FiniteTrainer.training_step

    def training_step(self: FiniteTrainer, model: PeftModel, inputs: Any, *args: Any) -> Tensor:
        batches.append(list(self._row_numbers(inputs)))
        return exact(self, model, inputs, *args)

    monkeypatch.setattr(FiniteTrainer, "training_step", training_step)
    Run(recipe, small_runs.silent())()
    assert all(len(batch) == 2 for batch in batches)
    rows = sorted(number for batch in batches for number in batch)
    assert rows == list(range(1, len(rows) + 1))


def scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have trainers scale the loss as they do in float16, which accelerate allows on GPUs only."""
    exact = FiniteTrainer.create_accelerator_and_postprocess

    def create(self: FiniteTrainer) -> None:
        exact(self)
        self.accelerator.scaler, self.accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=2.0), True
        self.accelerator.state._mixed_precision = "fp16"

    monkeypatch.setattr(FiniteTrainer, "create_accelerator_and_postprocess", create)
    monkeypatch.setattr(Accelerator, "autocast", lambda self, *_: contextlib.nullcontext())


@pytest.mark.parametrize("clip", [1.0, 0.0])
@pytest.mark.parametrize(("what", "left_out"), [("gradient", 0), ("nan", 1)])
@pytest.mark.parametrize("kind", ["lora", "sora"])
def test_a_gradient_scaler_s_own_steps_are_its_own_and_a_loss_that_is_no_number_is_left_out(
    kind: str,
    what: str,
    left_out: int,
    clip: float,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scaled(monkeypatch)
    name, changes = KINDS[kind]
    stages = [dict(changes["stages"][0]) | {"on_nan": "skip"}]
    recipe = small_runs.recipe(name, tmp_path, model_folder, **(changes | {"stages": stages}))
    weights = poison(monkeypatch, what, 3)
    trainers: list[FiniteTrainer] = []
    train = FiniteTrainer.train

    def watched(self: FiniteTrainer, *args: Any, **more: Any) -> Any:
        trainers.append(self)
        self.args.max_grad_norm = clip
        return train(self, *args, **more)

    monkeypatch.setattr(FiniteTrainer, "train", watched)
    results = Run(recipe, small_runs.silent())()
    assert results["counts"].get(f"{recipe.stages[0].name}: {SKIPPED}", 0) == left_out
    same = [all(torch.equal(one[name], two[name]) for name in one) for one, two in pairwise(weights)]
    assert [number for number, unchanged in enumerate(same, 1) if unchanged] == [3]
    assert trainers[0].accelerator.scaler.get_scale() == (2.0 if what == "nan" else 1.0)


def test_measures_that_are_no_number_are_counted_and_written_as_null(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*args: Any, **more: Any) -> dict[str, Any]:
        row = exact(*args, **more)
        return row | {"metrics": row["metrics"] | {"loss": math.nan}}

    exact = rankwise.run.measured
    monkeypatch.setattr(rankwise.run, "measured", measured)
    recipe = small_runs.recipe("instructions", tmp_path, model_folder, stages=[SHORT])
    Run(recipe, small_runs.silent())()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    written = (Path(recipe.output) / "results.json").read_text(encoding="utf-8")
    results = json.loads(written, parse_constant=refuse)
    assert results["counts"]["sft: measures that are no number"] == 1
    assert results["rows"][-1]["metrics"]["loss"] is None
    assert read_results(Path(recipe.output)) == results


def test_a_deterministic_run_has_torch_refuse_what_is_not_while_it_runs(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    exact = rankwise.run.train_stage

    def watched(*args: Any, **more: Any) -> dict[str, int]:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return exact(*args, **more)

    monkeypatch.setattr(rankwise.run, "train_stage", watched)
    for wanted in (True, False):
        recipe = small_runs.recipe("instructions", tmp_path / str(wanted), model_folder, deterministic=wanted)
        Run(recipe, small_runs.silent())()
    assert seen == [True, False] and not torch.are_deterministic_algorithms_enabled()
