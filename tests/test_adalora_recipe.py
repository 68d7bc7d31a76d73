"""AdaLoRA as a recipe's adapter, from data to a plain LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import small_runs
from rankwise.analysis import read_adapter
from rankwise.errors import UserError
from rankwise.evaluation import evaluate_run, export_folder
from rankwise.models import load_classifier, load_language_model
from rankwise.ranks import adalora_ranks
from rankwise.recipes import make_recipe
from rankwise.run import Run

IDS = torch.tensor([[0, 40, 50, 60, 70, 80, 90, 100], [0, 45, 55, 65, 75, 85, 95, 105]])
ADAPTER = {"kind": "adalora", "r": 2, "initial_rank": 4}
LAYERS = 14  # of the small Llama: seven linear modules in each of two layers


class Kept(Run):
    """A run that keeps what its trained model computes, and its ranks."""

    def _finish(self, model: peft.PeftModel) -> None:
        self.config, self.ranks = model.peft_config["default"], adalora_ranks(model)
        with torch.no_grad():
            self.logits = model.eval()(input_ids=IDS).logits
        super()._finish(model)


def plain(run: Run, folder: Path) -> torch.Tensor:
    """Logits of an exported adapter, loaded by peft."""
    settings = run.recipe.model
    if run.results.get("labels"):
        model = load_classifier(settings, run.results["labels"], 1)
    else:
        model = load_language_model(settings)
    loaded = peft.PeftModel.from_pretrained(model, folder)
    assert type(loaded.peft_config["default"]) is peft.LoraConfig
    with torch.no_grad():
        return loaded(input_ids=IDS).logits


@pytest.mark.parametrize("kind", ["classification", "instructions"])
def test_a_run(tmp_path, model_folder, kind):
    """Two batches to a step; ranks fall to a mean of 2, differ, and are those of the finished LoRA."""
    stage = small_runs.SFT | {"epochs": 6, "batch_size": 2, "accumulation": 2, "clip": 0.5}
    recipe = small_runs.recipe(kind, tmp_path, model_folder, adapter=ADAPTER, stages=[stage])
    console = small_runs.silent()
    run = Kept(recipe, console)
    results = run()
    assert sum(run.ranks.values()) == 2 * LAYERS and len(set(run.ranks.values())) > 1
    steps = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert run.config.total_step == steps and run.config.tinit == round(0.15 * steps)
    ranks = {row["module"]: row for row in json.loads((run.folder / "ranks.json").read_text())}
    assert {name: row["rank"] for name, row in ranks.items()} == run.ranks
    assert {row["initial_rank"] for row in ranks.values()} == {4}
    torch.testing.assert_close(plain(run, run.folder / "adapter"), run.logits, atol=1e-5, rtol=1e-5)
    stored, _ = read_adapter(run.folder / "stages" / "sft")
    assert {row["module"]: row["rank"] for row in stored} == run.ranks
    again = evaluate_run(run.folder, (), console)
    assert again["rows"][-1]["metrics"] == pytest.approx(results["rows"][-1]["metrics"], rel=1e-5)
    options: dict[str, Any] = {"stage": None, "rank": None, "energy": None, "layout": "compact"}
    export_folder(run.folder, tmp_path / "compact", console, **options)
    torch.testing.assert_close(plain(run, tmp_path / "compact"), run.logits, atol=1e-5, rtol=1e-5)
    export_folder(run.folder / "stages" / "sft", tmp_path / "own", console, **options, model=str(model_folder))
    torch.testing.assert_close(plain(run, tmp_path / "own"), run.logits, atol=1e-5, rtol=1e-5)


def test_a_run_that_was_cut_off_after_its_stage_is_finished(tmp_path, model_folder, monkeypatch):
    recipe = small_runs.recipe("instructions", tmp_path, model_folder, adapter=ADAPTER)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Run, "_finish", crash)
        Run(recipe, small_runs.silent())()
    run = Kept(recipe, small_runs.silent(), resume=True)
    run()
    assert sum(run.ranks.values()) == 2 * LAYERS
    torch.testing.assert_close(plain(run, run.folder / "adapter"), run.logits, atol=1e-5, rtol=1e-5)


def test_the_adapters_settings_reach_pefts_config(tmp_path, model_folder):
    changes = {"every": 2, "orthogonality": 0.3, "beta1": 0.7, "beta2": 0.8, "warmup_share": 0.2, "final_share": 0.25}
    recipe = small_runs.recipe("instructions", tmp_path, model_folder, adapter=ADAPTER | changes | {"alpha": 3})
    run = Kept(recipe, small_runs.silent())
    run()
    found = run.config
    total = found.total_step
    assert (found.init_r, found.target_r, found.lora_alpha, found.deltaT) == (4, 2, 3, 2)
    assert (found.orth_reg_weight, found.beta1, found.beta2) == (0.3, 0.7, 0.8)
    assert (found.tinit, found.tfinal) == (round(0.2 * total), round(0.25 * total))


def test_the_start_is_one_and_a_half_times_the_end(tmp_path, model_folder):
    for rank, start in ((1, 2), (2, 3), (5, 8), (16, 24)):
        values = small_runs.values("text", tmp_path, model_folder, adapter={"kind": "adalora", "r": rank})
        assert make_recipe(values).adapter.first_rank == start


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"use_dora": True}, "use_dora is not for AdaLoRA"),
        ({"use_rslora": True}, "use_rslora is not for AdaLoRA"),
        ({"lora_plus_ratio": 4.0}, "lora_plus_ratio is not for AdaLoRA"),
        ({"initial_rank": 2}, "initial_rank 2 leaves nothing to cut: it must be above r, 2"),
        ({"warmup_share": 0.5}, r"warmup_share 0\.5 and final_share 0\.5 leave no step"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, model_folder, adapter, message):
    with pytest.raises(UserError, match=message):
        small_runs.recipe("text", tmp_path, model_folder, adapter=ADAPTER | adapter)


def test_several_stages_are_refused(tmp_path, model_folder):
    stages = [small_runs.SFT | {"name": name} for name in ("one", "two")]
    with pytest.raises(UserError, match="adalora is for one stage, and there are 2: its ranks fall over the steps"):
        small_runs.recipe("text", tmp_path, model_folder, adapter=ADAPTER, stages=stages)


def test_a_training_too_short_for_a_schedule_is_told(tmp_path, model_folder):
    stage = small_runs.SFT | {"epochs": 1, "batch_size": 64}
    recipe = small_runs.recipe("text", tmp_path, model_folder, adapter=ADAPTER | {"final_share": 0.8}, stages=[stage])
    with pytest.raises(UserError, match="AdaLoRA has 1 steps, of which 0 are its warm-up and 1 its end"):
        Run(recipe, small_runs.silent())()


def test_a_module_that_adalora_cannot_adapt_is_named(tmp_path, model_folder):
    adapter = ADAPTER | {"target_modules": ["embed_tokens", "q_proj"]}
    recipe = small_runs.recipe("text", tmp_path, model_folder, adapter=adapter)
    with pytest.raises(UserError, match=r"adapter\.target_modules .*Target module Embedding\(.* is not supported"):
        Run(recipe, small_runs.silent())()
