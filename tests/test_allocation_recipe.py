"""Allocating LoRA in a recipe: trained, resumed, exported, loaded by PEFT alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel

import rankwise.run
import small_runs
from rankwise.errors import UserError
from rankwise.evaluation import evaluate_run
from rankwise.models import load_classifier, load_language_model
from rankwise.optimisation import hold_out
from rankwise.recipes import make_recipe
from rankwise.run import Run
from rankwise.schema import AllocatingLoraSettings, LoraSettings

IDS = torch.tensor([[0, 40, 50, 60, 70, 80, 90, 100], [0, 45, 55, 65, 75, 85, 95, 105]])
ADAPTER = {"kind": "allocating_lora", "r": 2, "events": 2, "share": 0.3, "validation_rows": 6}
ADAPTER |= {"target_modules": ["q_proj", "v_proj", "down_proj"]}
STAGES = {
    "instructions": [small_runs.SFT | {"epochs": 4, "batch_size": 2}],
    "classification": [small_runs.SFT | {"epochs": 4}],
    "interactions": [
        small_runs.SFT,
        small_runs.DPO | {"name": "DPO", "negatives": 1},
        small_runs.DPO | {"name": "softmax-DPO", "negatives": 3},
    ],
}


class Kept(Run):
    """A run that keeps what its trained model computes, and its ranks."""

    def _finish(self, model: PeftModel) -> None:
        with torch.no_grad():
            self.logits = model.eval()(input_ids=IDS).logits
        self.pattern = dict(model.peft_config["default"].rank_pattern)
        super()._finish(model)


def run(kind: str, folder: Path, base: Path, resume: bool = False, **changes: Any) -> Kept:
    settings = {"adapter": ADAPTER, "stages": STAGES[kind]} | changes
    made = Kept(small_runs.recipe(kind, folder, base, **settings), small_runs.silent(), resume=resume)
    made()
    return made


@pytest.fixture(scope="module")
def finished(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kept]:
    return {kind: run(kind, tmp_path_factory.mktemp(kind), model_folder) for kind in STAGES}


def moves(made: Kept) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (made.folder / "allocations.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", STAGES)
def test_ranks_move_and_their_sum_stays(finished: dict[str, Kept], kind: str) -> None:
    made = finished[kind]
    lines = moves(made)
    assert [line["stage"] for line in lines] == [one.name for one in made.recipe.stages for _ in range(2)]
    assert all(line["moved"] == 4 and sum(line["ranks"].values()) == 12 for line in lines)
    assert len(set(made.pattern.values())) > 1 and sum(made.pattern.values()) == 12
    last = {name: rank for name, rank in lines[-1]["ranks"].items() if rank}
    assert last == made.pattern
    ranks = json.loads((made.folder / "ranks.json").read_text())
    assert len(ranks) == 6 and {row["initial_rank"] for row in ranks} == {2}
    assert sum(row["rank"] for row in ranks) <= 12
    assert {row["module"] for row in ranks if not row["rank"]} >= {row["module"] for row in ranks} - set(last)


@pytest.mark.parametrize("kind", STAGES)
def test_counts_tell_what_was_held_out_and_moved(finished: dict[str, Kept], kind: str) -> None:
    made = finished[kind]
    for stage in made.recipe.stages:
        of_stage = [line for line in moves(made) if line["stage"] == stage.name]
        removed = sum(rank == 0 for line in of_stage for rank in line["ranks"].values())
        counts = {
            name.removeprefix(f"{stage.name}: "): count
            for name, count in made.results["counts"].items()
            if name.startswith(f"{stage.name}: ")
        }
        assert counts["rows held out to score directions"] == 6
        assert counts["directions moved"] == 8
        assert counts["layers whose adapter was removed"] == removed


@pytest.mark.parametrize("kind", STAGES)
def test_the_export_computes_the_same_in_peft(finished: dict[str, Kept], model_folder: Path, kind: str) -> None:
    made = finished[kind]
    if kind == "classification":
        base = load_classifier(made.recipe.model, made.results["labels"], 1)
    else:
        base = load_language_model(made.recipe.model)
    loaded = PeftModel.from_pretrained(base, made.folder / "adapter").eval()
    assert type(loaded.peft_config["default"]) is LoraConfig
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=IDS).logits, made.logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", STAGES)
def test_the_last_stage_opens_again(finished: dict[str, Kept], kind: str) -> None:
    made = finished[kind]
    again = evaluate_run(made.folder, (), small_runs.silent())
    assert again["rows"][-1]["metrics"] == pytest.approx(made.results["rows"][-1]["metrics"], abs=1e-6)
    (made.folder / "evaluation.json").unlink()


def test_a_stage_starts_from_other_ranks_than_the_model_holds(finished: dict[str, Kept]) -> None:
    """softmax-DPO starts from sft, after DPO has moved directions: its own first ranks are those of sft."""
    lines = moves(finished["interactions"])
    sft, dpo, last = ([line for line in lines if line["stage"] == name] for name in ("sft", "DPO", "softmax-DPO"))
    saved = {name: rank for name, rank in sft[-1]["ranks"].items() if rank}
    assert last[0]["ranks_before"] == dpo[0]["ranks_before"] == saved != dpo[-1]["ranks"]


@pytest.mark.parametrize("stage", ["DPO", "softmax-DPO"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    finished: dict[str, Kept], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    exact = rankwise.run.train_stage

    def crashing(model: PeftModel, tokenizer: Any, settings: Any, rows: Any, **more: Any) -> dict[str, int]:
        done = exact(model, tokenizer, settings, rows, **more)
        if settings.name == stage:
            raise RuntimeError("the lights went out")
        return done

    with monkeypatch.context() as patch:
        patch.setattr(rankwise.run, "train_stage", crashing)
        with pytest.raises(RuntimeError, match="the lights went out"):
            run("interactions", tmp_path, model_folder)
    resumed, whole = run("interactions", tmp_path, model_folder, resume=True), finished["interactions"]
    assert resumed.results["rows"] == whole.results["rows"]
    assert resumed.results["counts"] == whole.results["counts"]
    assert torch.equal(resumed.logits, whole.logits)
    unlike = ("seconds",)
    found, expected = (
        [{name: value for name, value in line.items() if name not in unlike} for line in moves(one)]
        for one in (resumed, whole)
    )
    assert found == expected


def test_rows_held_out_are_drawn_by_the_seed() -> None:
    settings = AllocatingLoraSettings(validation_rows=3)
    rows, held = hold_out(list(range(10)), settings, 4, 0)
    assert len(held) == 3 and sorted([*rows, *held]) == list(range(10)) and rows == sorted(rows)
    assert (rows, held) == hold_out(list(range(10)), settings, 4, 0)
    found = [hold_out(list(range(10)), settings, 4, seed)[1] for seed in range(6)]
    assert any(set(one) != set(held) for one in found) and any(one != sorted(one) for one in found)
    few = AllocatingLoraSettings(validation_rows=9, events=2)
    assert len(hold_out(list(range(10)), few, 2, 0)[1]) == 4, "a batch for each event is all that is used"
    assert hold_out([5, 6], LoraSettings(), 4, 0) == ([5, 6], [])


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora is not for allocating LoRA: leave it out, or take kind lora or milora"),
        ({"lora_plus_ratio": 4}, "lora_plus_ratio is not for allocating LoRA"),
        ({"first": 0.8}, r"first 0.8 is after last 0.7: directions are moved from first to last"),
        ({"last": 1.0}, "adapter.last 1.0: Input should be less than 1"),
        ({"share": 1.0}, "adapter.share 1.0: Input should be less than 1"),
        ({"events": 0}, "adapter.events 0: Input should be greater than or equal to 1"),
        ({"validation_rows": 0}, "adapter.validation_rows 0: Input should be greater than or equal to 1"),
        ({"part": "minor"}, "adapter.part is unknown"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    values = small_runs.values("instructions", tmp_path, tmp_path, adapter=ADAPTER | changes)
    with pytest.raises(UserError, match=message):
        make_recipe(values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"validation_rows": 500, "events": 90},
            r"adapter.validation_rows 500 leaves nothing to train on, of \d+ train",
        ),
        ({"events": 30}, r"cannot be moved 30 times from 0.2 to 0.7 of a training of \d+ steps"),
    ],
)
def test_a_stage_that_is_too_small_is_refused_before_it_is_trained(
    tmp_path: Path, model_folder: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run("instructions", tmp_path, model_folder, adapter=ADAPTER | changes)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
