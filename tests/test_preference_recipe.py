"""Preference stages of a recipe: which answers they draw, and what their loss is made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import small_runs
from rankwise.errors import UserError
from rankwise.run import Run


def stages(**changes: Any) -> list[dict[str, Any]]:
    return [small_runs.SFT, small_runs.DPO | {"name": "preferences", "epochs": 2} | changes]


def losses(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["stage"] == "preferences" and "loss" in line]


def test_hard_answers_of_the_whole_catalogue_more_of_them_by_and_by(model_folder: Path, tmp_path: Path) -> None:
    """The first loss is log 2, as with one negative; there are up to three in the second half."""
    cache = tmp_path / "cache"
    options = {"draw": "hard", "negatives": [1, 3], "mine_every": 2, "sft_weight": 0.5, "reference_cache": str(cache)}
    recipe = small_runs.recipe("interactions", tmp_path, model_folder, stages=stages(**options))
    Run(recipe, small_runs.silent())()
    found = losses(tmp_path / "run")
    assert found[0]["loss"] == pytest.approx(0.6931472 + 0.5 * found[0]["nll/chosen"], abs=1e-5)
    effective = [line["negatives/effective"] for line in found]
    assert effective[:3] == pytest.approx([1.0] * 3)
    assert 1 < effective[-1] <= 3


@pytest.mark.parametrize("draw", ["candidates", "uniform", "popularity", "in-batch"])
def test_answers_are_drawn_anew(model_folder: Path, tmp_path: Path, draw: str) -> None:
    recipe = small_runs.recipe("interactions", tmp_path, model_folder, stages=stages(draw=draw, negatives=2))
    results = Run(recipe, small_runs.silent())()
    assert losses(tmp_path / "run")[0]["loss"] == pytest.approx(1.0986123, abs=1e-5)
    assert {row["name"] for row in results["rows"]} >= {"sft", "preferences"}


def test_the_base_is_the_reference_where_the_stage_says_so(model_folder: Path, tmp_path: Path) -> None:
    """After supervised training the policy is not the base: the first margins are not 0."""
    recipe = small_runs.recipe("interactions", tmp_path, model_folder, stages=stages(reference="base"))
    Run(recipe, small_runs.silent())()
    assert abs(losses(tmp_path / "run")[0]["rewards/margins"]) > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"negatives": [3, 1]}, r"\[3, 1\] does not grow"),
        ({"negatives": []}, "does not grow"),
        ({"negatives": [1, 4]}, r"stages.1.negatives \[1, 4\] is more than data.negatives"),
        ({"draw": "hardest"}, "hardest"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"draw": "in-batch", "batch_size": 3}, "batch_size 3 is not possible: 3 negatives of a batch need 4 rows"),
        ({"draw": "uniform", "weigh_negatives": True}, "weigh_negatives True is not possible: uniform negatives"),
        ({"mine_every": 2}, "mine_every 2 is not possible: it is for hard negatives only"),
        ({"draw": "hard", "mine_pool": 2}, "mine_pool 2 is not possible: 3 negatives are mined from it"),
    ],
)
def test_mistakes_are_named(model_folder: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small_runs.recipe("interactions", tmp_path, model_folder, stages=stages(**change))
