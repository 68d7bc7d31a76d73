"""SoRA trained at one threshold after the other: from the recipe to the stages, their scores and the page."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model
from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import rankwise.run
import small_runs
from rankwise.analysis.runfolder import read_run
from rankwise.errors import UserError
from rankwise.evaluation import _trained, evaluate_run, export_folder
from rankwise.models import load_tokenizer
from rankwise.progress import MetricsFile
from rankwise.ranks import SoraConfig, gate_counts, gates
from rankwise.recipes import load_recipe
from rankwise.run import Run
from rankwise.sampling import sample
from rankwise.schema import ModelSettings, Recipe, SftStage, SoraSettings
from rankwise.tasks.answers import AnswerTask
from rankwise.tasks.load import load_task
from rankwise.tokenise import AnswerCollator
from rankwise.training import AnswerTrainer, train_stage
from tiny import adapted

THRESHOLDS = [0.0, 0.04, 0.08]
STAGES = [small_runs.SFT | {"epochs": 2, "thresholds": {"largest": 0.08, "stages": 3}}]
NAMES = ["sft-1", "sft-2", "sft-3"]


def recipe(folder: Path, base: Path, **changes: Any) -> Recipe:
    evaluation = {"training_cases": 20}
    return small_runs.recipe("classification", folder, base, **{"stages": STAGES, "evaluation": evaluation} | changes)


@pytest.fixture(scope="module")
def finished(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """The folder of a run, its results, and what it printed."""
    console = small_runs.silent()
    made = Run(recipe(tmp_path_factory.mktemp("thresholds"), model_folder), console)
    return made.folder, made(), small_runs.printed(console)


def of_stage(folder: Path, stage: str) -> list[dict[str, Any]]:
    return [line for line in read_run(folder).metrics if line["stage"] == stage]


def test_each_threshold_is_a_stage(finished: tuple[Path, dict[str, Any], str]) -> None:
    folder, results, _ = finished
    stages = yaml.safe_load((folder / "recipe.yaml").read_text())["stages"]
    assert [(one["name"], one["start"], one["threshold"], one["thresholds"]) for one in stages] == [
        ("sft-1", None, 0.0, None),
        ("sft-2", "sft-1", 0.04, None),
        ("sft-3", "sft-2", 0.08, None),
    ]
    assert sorted(path.name for path in (folder / "stages").iterdir()) == NAMES
    assert [row["name"] for row in results["rows"]] == ["most frequent", "base model", *NAMES]
    for stage, threshold in zip(NAMES, THRESHOLDS, strict=True):
        assert {line["threshold"] for line in of_stage(folder, stage)} == {threshold}


def test_a_stages_config_is_saved_with_the_adapters_own_threshold(finished: tuple[Path, dict[str, Any], str]) -> None:
    saved = json.loads((finished[0] / "stages" / "sft-3" / "adapter_config.json").read_text())
    assert saved["threshold"] == 0.03


def test_rows_have_what_the_gates_leave_and_the_training_score(finished: tuple[Path, dict[str, Any], str]) -> None:
    folder, results, printed = finished
    rows = {row["name"]: row for row in results["rows"]}
    for stage in NAMES:
        last = of_stage(folder, stage)[-1]
        assert rows[stage]["adapter"] == {key: last[key] for key in ("gates_left", "gates", "parameters_left")}
        assert rows[stage]["training_metrics"].keys() == rows[stage]["metrics"].keys()
        assert rows[stage]["training_cases"] == 20
    left = [rows[stage]["adapter"]["gates_left"] for stage in NAMES]
    assert left[0] == 4 * 14 > left[1] > left[2]
    assert "training_metrics" in rows["base model"] and "adapter" not in rows["base model"]
    assert "training_metrics" not in rows["most frequent"]
    assert f"{left[2]} of 56 gates left" in printed and "on training rows: accuracy" in printed


def test_training_rows_are_measured_as_the_held_out_ones(
    finished: tuple[Path, dict[str, Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the two parts exchanged, each measure gives what the other gave."""
    folder, results, _ = finished
    made = load_recipe(folder / "recipe.yaml")
    tokenizer = load_tokenizer(made.model.path)
    task = load_task(made, tokenizer, 128)
    model = _trained(folder, made, "sft-3")
    drawn = sample(task.sft_rows(), 20, made.seed)[0]
    found = task.evaluate_training(model, 20, made.seed)
    task._held_out, task._train = drawn, task._held_out
    assert task.evaluate_training(model, 1000, 5) == results["rows"][-1]["metrics"]
    task.cases = len(drawn)
    assert task.evaluate(model).metrics == found == results["rows"][-1]["training_metrics"]
    seen = []
    monkeypatch.setattr(task, "_outputs", lambda _, rows: seen.append(list(rows)))
    monkeypatch.setattr(task, "_scores", lambda rows, outputs: {})
    task.evaluate_training(model, 2, 3)
    assert seen == [sample(task.sft_rows(), 2, 3)[0]] != [list(task.sft_rows()[:2])]


def test_evaluating_again_gives_the_same_row(finished: tuple[Path, dict[str, Any], str]) -> None:
    again = evaluate_run(finished[0], (), small_runs.silent())
    assert again["rows"][-1] == finished[1]["rows"][-1]
    (finished[0] / "evaluation.json").unlink()


def test_the_page_shows_the_curve_and_the_history(finished: tuple[Path, dict[str, Any], str]) -> None:
    page = (finished[0] / "report.html").read_text(encoding="utf-8")
    assert ">Memorisation and generalisation<" in page and 'data-figure="retention"' in page
    assert "The accuracy on 20 training rows and on the held-out cases" in page
    for title in ("Gates left", "Parameters left", "Threshold", "Directions left by layer"):
        assert f"<h3>{title}</h3>" in page


def test_a_stopped_run_ends_as_one_that_was_not(
    finished: tuple[Path, dict[str, Any], str], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(tmp_path, model_folder)
    exact = rankwise.run.train_stage

    def crashing(model: PeftModel, tokenizer: Any, stage: Any, rows: Any, **more: Any) -> dict[str, int]:
        if stage.name == "sft-3":
            raise RuntimeError("the lights went out")
        return exact(model, tokenizer, stage, rows, **more)

    with monkeypatch.context() as patch:
        patch.setattr(rankwise.run, "train_stage", crashing)
        with pytest.raises(RuntimeError, match="the lights went out"):
            Run(made, small_runs.silent())()
    assert Run(made, small_runs.silent(), resume=True)()["rows"] == finished[1]["rows"]


def test_a_threshold_that_closes_every_gate_leaves_what_the_stage_before_it_left(
    model_folder: Path, tmp_path: Path
) -> None:
    """The finished stages are exported and reported; then the run says why it ended."""
    stages = [small_runs.SFT | {"epochs": 1, "thresholds": [0.0, 50.0, 60.0]}]
    made = Run(recipe(tmp_path, model_folder, stages=stages), small_runs.silent())
    with pytest.raises(UserError, match="stage sft-2: a threshold of 50 closed every one of 56 gates at step 1 "):
        made()
    results = json.loads((made.folder / "results.json").read_text())
    assert [row["name"] for row in results["rows"]][-1] == "sft-1" and "sft-2" in results["stopped"]
    assert results["counts"]["layers whose adapter was removed"] == 0
    assert (made.folder / "adapter" / "adapter_model.safetensors").is_file()
    assert "The run was stopped: stage sft-2" in (made.folder / "report.html").read_text(encoding="utf-8")
    again = evaluate_run(made.folder, [], small_runs.silent())
    assert again["rows"][-1]["name"] == "sft-1"
    assert export_folder(made.folder, tmp_path / "out", small_runs.silent(), rank=None, energy=None, layout="uniform")


def test_cuts_while_training_are_counted_as_those_at_the_end(model_folder: Path, tmp_path: Path) -> None:
    counts = []
    for wait in (None, 2):
        adapter = {"kind": "sora", "r": 4, "threshold": 0.08, "gate_lr": 0.01, "shrink_after": wait}
        stages = [small_runs.SFT | {"epochs": 4}]
        made = Run(recipe(tmp_path / str(wait), model_folder, stages=stages, adapter=adapter), small_runs.silent())
        counts.append(made()["counts"])
    assert counts[0]["layers whose adapter was removed"] > 0
    assert counts[0] == counts[1]


def test_an_adapter_without_gates_has_training_scores_and_no_counts(model_folder: Path, tmp_path: Path) -> None:
    changes = {"evaluation": {"training_cases": 1000, "base": False}, "stages": [small_runs.SFT]}
    made = Run(small_runs.recipe("instructions", tmp_path, model_folder, **changes), small_runs.silent())
    (row,) = made()["rows"]
    assert row["training_metrics"].keys() == row["metrics"].keys() and row["training_metrics"] != row["metrics"]
    assert row["training_cases"] == 22 and "adapter" not in row


def test_losses_of_training_rows_are_those_of_held_out_rows(tiny_llama: LlamaForCausalLM) -> None:
    """With the two parts exchanged, each measure gives what the other gave."""
    rows = [{"input_ids": list(range(2, 9 + at)), "labels": [-100] * 4 + list(range(6, 9 + at))} for at in range(6)]
    one, other = (
        AnswerTask("text", *parts, ModelSettings(), {}) for parts in ((rows[:4], rows[4:]), (rows[4:], rows[:4]))
    )
    assert one.evaluate_training(tiny_llama, 9, 0) == other.evaluate(tiny_llama).metrics
    assert other.evaluate_training(tiny_llama, 9, 0) == one.evaluate(tiny_llama).metrics
    drawn = AnswerTask("text", rows, sample(rows, 3, 5)[0], ModelSettings(), {})
    assert drawn.evaluate_training(tiny_llama, 3, 5) == drawn.evaluate(tiny_llama).metrics


def test_recommendation_has_no_such_measure(model_folder: Path, tmp_path: Path) -> None:
    made = small_runs.recipe("sdpo", tmp_path, model_folder)
    tokenizer = load_tokenizer(made.model.path)
    task = load_task(made, tokenizer, 128)
    with pytest.raises(UserError, match=r"leave evaluation\.training_cases out"):
        task.evaluate_training(task.load_model(), 4, 0)


# One stage


@pytest.mark.parametrize("fails", [False, True])
def test_the_threshold_is_the_stages_while_it_trains(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, fails: bool
) -> None:
    """Gates of one shrink by each stage's own threshold; afterwards, and after a failure, the adapter's is back."""
    config = SoraConfig(r=4, target_modules="all-linear", threshold=0.25, gate_init="ones", l1=0.0)
    model = get_peft_model(tiny_llama, config)
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}]
    settings = {"adapter": SoraSettings(r=4), "context": 64, "seed": 0, "bfloat16": False}

    class Failing(AnswerTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            if fails:
                raise RuntimeError("the lights went out")
            return super().training_step(*args, **kwargs)

    def trainer(**kwargs: Any) -> Failing:
        return Failing(data_collator=AnswerCollator.of(tiny_tokenizer), **kwargs)

    left = 1.0
    for own, threshold in (({}, 0.25), ({"threshold": 0.0}, 0.0), ({"threshold": 0.5}, 0.5)):
        stage = SftStage(kind="sft", name="sft", learning_rate=1e-6, **own)
        with pytest.raises(RuntimeError, match="the lights") if fails else contextlib.nullcontext():
            train_stage(
                model,
                tiny_tokenizer,
                stage,
                rows,
                folder=tmp_path,
                console=small_runs.silent(),
                trainer=trainer,
                **settings,
            )
        left -= 0.0 if fails else threshold
        assert all((gate - left).abs().max() < 1e-5 for gate in gates(model).values())
        assert model.peft_config["default"].threshold == 0.25


def test_ranks_are_logged_at_every_tenth(tmp_path: Path) -> None:
    """A hundred steps, a line for every second: twelve of the lines have ranks, for a training of a new stage again."""
    model = adapted("llama", SoraConfig)
    with torch.no_grad():
        next(iter(gates(model).values()))[1:] = 0
    for stage in ("a", "b"):
        file = MetricsFile(tmp_path / "metrics.jsonl", stage)
        for step in [1, *range(2, 101, 2), 100]:
            state = TrainerState(global_step=step, max_steps=100)
            file.on_log(TrainingArguments(str(tmp_path)), state, TrainerControl(), {"loss": 1.0}, model)
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    with_ranks = [(line["stage"], line["step"]) for line in found if "ranks" in line]
    assert with_ranks == [(stage, step) for stage in ("a", "b") for step in (1, *range(10, 101, 10))]
    ranks = found[0]["ranks"]
    assert ranks == {name: int((gate != 0).sum()) for name, gate in gates(model).items()}
    assert sum(ranks.values()) == gate_counts(model)["gates_left"] < found[0]["gates"]
