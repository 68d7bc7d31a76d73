"""Mistakes are told before anything slow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rankwise.run
import small_runs
from rankwise.errors import UserError
from rankwise.run import Run


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading data or a model is too late for a mistake that could be seen before."""

    def slow(*_: Any, **__: Any) -> None:
        raise AssertionError("slow work was begun")

    monkeypatch.setattr(rankwise.run, "load_task", slow)


Change = Callable[[dict[str, Any], Path], Any]


def occupy(name: str) -> Change:
    """The output folder holds one file."""

    def change(_: dict[str, Any], folder: Path) -> None:
        (folder / "run").mkdir()
        (folder / "run" / name).write_text("mine", encoding="utf-8")

    return change


def put(section: str, **values: Any) -> Change:
    """Other values in a section of the recipe, or in its first stage."""
    return lambda recipe, _: (recipe["stages"][0] if section == "stage" else recipe[section]).update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (occupy("notes.txt"), "is not empty"),
        (occupy("recipe.yaml"), r"holds another run: give another folder \(output=...\), or remove it first"),
        (lambda _, folder: (folder / "run").write_text("a file"), "is a file: give a folder that is new or empty"),
        (put("data", items="no/items.csv"), "data.items no/items.csv does not exist"),
        (lambda recipe, folder: recipe["model"].update(path=str(folder)), "no model's folder"),
        (put("model", path="no-one/no-model"), "model.path no-one/no-model cannot be loaded"),
        (put("model", context=1000), "model.context 1000 is more than the model's 256"),
        (put("stage", epoch=3), r"stages.0.epoch is unknown: did you mean 'epochs'\?"),
        (put("data", histroy=3), r"data.histroy is unknown: did you mean 'history'\?"),
        (lambda recipe, _: recipe.update(sed=3), r"sed is unknown: did you mean 'seed'\?"),
    ],
)
def test_a_mistake_is_told_before_slow_work(
    model_folder: Path, tmp_path: Path, no_model: None, change: Change, message: str
) -> None:
    values = small_runs.values("interactions", tmp_path, model_folder)
    change(values, tmp_path)
    present = small_runs.hashes(tmp_path)
    with pytest.raises(UserError, match=message):
        Run(small_runs.make_recipe(values), small_runs.silent())()
    assert small_runs.hashes(tmp_path) == present


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            {"kind": "lora", "r": 10**12},
            f"adapter.r {10**12} is far more than the matrices of the model have: give .. or less",
        ),
        ({"kind": "milora", "r": 10**12}, f"adapter.r {10**12} is far more than the matrices of the model"),
        ({"kind": "sora", "r": 10**12}, f"adapter.r {10**12} is far more than the matrices of the model"),
        ({"kind": "adalora", "r": 10**12}, f"adapter.r {10**12} is far more than the matrices of the model"),
        ({"kind": "adalora", "initial_rank": 10**12}, f"adapter.initial_rank {10**12} is far more than the matrices"),
        ({"kind": "vera", "r": 10**12}, f"adapter.r {10**12} would make matrices larger than the whole model: give"),
        ({"kind": "bottleneck", "size": 10**12}, f"adapter.size {10**12} is far more than the matrices of the"),
        ({"kind": "prompt", "tokens": 10**12}, f"adapter.tokens {10**12} leaves no room in the model's 256 positions"),
        ({"kind": "prefix", "tokens": 10**12}, f"adapter.tokens {10**12} leaves no room in the model's 256 positions"),
    ],
)
def test_an_adapter_far_beyond_the_model_is_refused(
    model_folder: Path, tmp_path: Path, adapter: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Run(small_runs.recipe("text", tmp_path, model_folder, adapter=adapter), small_runs.silent())()


def test_labels_have_no_loss_on_whole_rows(model_folder: Path, tmp_path: Path) -> None:
    stages = [small_runs.SFT | {"loss": "row"}]
    with pytest.raises(UserError, match=r"stages\.0\.loss row: data of kind classification have no prompt"):
        small_runs.recipe("classification", tmp_path, model_folder, stages=stages)


def test_an_empty_folder_that_is_there_is_taken(model_folder: Path, tmp_path: Path, no_model: None) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(AssertionError, match="slow work was begun"):
        Run(small_runs.recipe("text", tmp_path, model_folder), small_runs.silent())()


def test_prompts_longer_than_the_context_are_counted(model_folder: Path, tmp_path: Path) -> None:
    model = {"path": str(model_folder), "context": 60}
    stages = [small_runs.SFT | {"epochs": 1}, small_runs.DPO | {"negatives": 3, "rows": 8}]
    console = small_runs.silent()
    recipe = small_runs.recipe("interactions", tmp_path, model_folder, model=model, stages=stages)
    counts = Run(recipe, console)()["counts"]
    assert counts["training prompts cut to the context"] == 32
    assert counts["evaluation prompts cut to the context"] == 16
    assert counts["softmax_dpo: prompts cut to the context"] == 8
    assert "evaluation prompts cut to the context: 16" in small_runs.printed(console)


def test_a_candidate_longer_than_the_context_is_told_before_the_model_is_loaded(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*_: Any) -> None:
        raise AssertionError("slow work was begun")

    monkeypatch.setattr("rankwise.tasks.recommendation.load_language_model", slow)
    recipe = small_runs.recipe("sdpo", tmp_path, model_folder, model={"path": str(model_folder), "context": 9})
    with pytest.raises(UserError, match=r"titles fits half of 9 tokens: raise model\.context|than half of 9 tokens"):
        Run(recipe, small_runs.silent())()


@pytest.mark.parametrize("possible", [False, True])
def test_a_processor_without_bfloat16_is_told(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, possible: bool
) -> None:
    """It is slow there, not wrong: the run goes on."""
    monkeypatch.setattr(rankwise.run, "computes_bfloat16", lambda: possible)
    recipe = small_runs.recipe(
        "classification",
        tmp_path,
        model_folder,
        stages=[small_runs.SFT | {"epochs": 0.1}],
        precision="bfloat16",
        evaluation={"base": False},
    )
    console = small_runs.silent()
    Run(recipe, console)()
    assert ("no bfloat16 arithmetic: precision=float32 is many times faster" in small_runs.printed(console)) != possible
