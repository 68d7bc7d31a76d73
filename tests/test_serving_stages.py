"""Stages that share one base model answer as each alone."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

import rankwise as rw
import small_runs
from rankwise.errors import UserError
from rankwise.models import load_language_model, load_tokenizer
from rankwise.recommend.recommender import Recommender
from rankwise.run import BASE, Run
from rankwise.serving.stages import load_stages
from rankwise.serving.worker import Question, answer_together

CHANGES: dict[str, dict[str, Any]] = {
    "milora": {"adapter": {"kind": "milora", "r": 4}},
    "milora with magnitudes": {
        "adapter": {"kind": "milora", "r": 4, "use_dora": True},
        "export": {"layout": "merged"},
    },
    "lora": {"adapter": {"kind": "lora", "r": 4}},
    "sora": {"adapter": {"kind": "sora", "r": 4, "threshold": 0.02, "gate_lr": 0.05, "shrink_after": 2}},
    "adalora": {"adapter": {"kind": "adalora", "r": 2}, "stages": [small_runs.LONG]},
    "allocating": {"adapter": {"kind": "allocating_lora", "r": 4, "validation_rows": 8, "events": 1}},
}


def answers(recommender: Recommender) -> list[tuple[str, float]]:
    history = recommender.store.histories["titles"][0].to_list()
    [ranking] = recommender.recommend([history], top=8)
    return [(one.title, one.score) for one in ranking.best]


@pytest.mark.parametrize("kind", CHANGES)
def test_each_stage_answers_as_if_it_were_alone(kind: str, model_folder: Path, tmp_path: Path) -> None:
    recipe = small_runs.recipe("interactions", tmp_path, model_folder, **CHANGES[kind])
    Run(recipe, small_runs.silent())()
    stages = load_stages(tmp_path / "run")
    trained = [stage.name for stage in recipe.stages]
    assert list(stages.kinds) == [BASE, *trained]
    recommender = stages.recommender
    base = Recommender(load_language_model(recipe.model), load_tokenizer(str(model_folder)), recommender.store, 128)
    alone = {name: answers(rw.load_recommender(tmp_path / "run", name)) for name in trained}
    alone[BASE] = answers(base)
    assert alone[BASE] != alone["sft"]
    for stage in [trained[-1], BASE, "sft", *trained, BASE, trained[-1]]:
        with stages.use(stage) as using:
            found = answers(using)
        assert [title for title, _ in found] == [title for title, _ in alone[stage]]
        assert [score for _, score in found] == pytest.approx([score for _, score in alone[stage]], abs=1e-5)


@pytest.fixture(scope="module")
def run(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    Run(small_runs.recipe("interactions", folder, model_folder), small_runs.silent())()
    return folder / "run"


def test_the_base_is_in_memory_once(run: Path) -> None:
    one = load_stages(run, ["sft"]).recommender.model
    every = load_stages(run).recommender.model
    base = {name for name, _ in one.named_parameters() if "lora_" not in name}
    assert {name for name, _ in every.named_parameters() if "lora_" not in name} == base
    assert not any(parameter.requires_grad for parameter in every.parameters())
    shared = {name: tensor for name, tensor in one.named_parameters() if name in base}
    assert all(torch.equal(tensor, every.get_parameter(name)) for name, tensor in shared.items())


@pytest.mark.parametrize("candidates", [None, 3])
def test_an_answer_leaves_no_tensor_behind(run: Path, candidates: int | None) -> None:
    """Keys and values are freed with the answer, and do not wait for the garbage collector."""
    stages = load_stages(run, ["sft"])
    store = stages.recommender.store
    listed = None if candidates is None else tuple(store.titles["title"].head(candidates).to_list())
    questions = [Question("sft", tuple(titles), listed) for titles in store.histories["titles"].to_list()[:3]]

    def left() -> int:
        answer_together(stages, questions)
        return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())

    left()  # what is made once is made here
    gc.collect()
    gc.disable()
    try:
        first = left()
        assert {left() for _ in range(3)} == {first}
    finally:
        gc.enable()


def test_some_stages_alone(run: Path) -> None:
    every = load_stages(run)
    assert (every.before, every.after) == ("sft", "softmax-DPO")
    stages = load_stages(run, ["softmax-DPO", BASE])
    assert list(stages.kinds) == [BASE, "softmax-DPO"]
    assert (stages.before, stages.after) == (BASE, "softmax-DPO")
    only = load_stages(run, ["DPO"])
    assert (only.before, only.after) == ("DPO", "DPO")
    with pytest.raises(UserError, match="stage 'sft' is not served: known: DPO"), only.use("sft"):
        pass


def test_runs_that_cannot_be_served(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stage 'sftt' is not in .*: did you mean 'sft'"):
        load_stages(run, ["sftt"])
    with pytest.raises(UserError, match=r"has no recipe\.yaml"):
        load_stages(tmp_path)
    (tmp_path / "recipe.yaml").write_text((run / "recipe.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(UserError, match=r"no settings\.json: recommendations need a finished run"):
        load_stages(tmp_path)
