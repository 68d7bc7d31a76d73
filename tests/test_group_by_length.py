"""Batches of rows of about the same length, in each kind of supervised training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

import small_runs
from rankwise.run import Run


def padding(kind: str, grouped: bool, folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many tokens of an epoch are padding."""
    step, padded = Trainer.training_step, []

    def counted(self: Trainer, model: Any, inputs: Any, *rest: Any) -> Any:
        padded.append(int((inputs["attention_mask"] == 0).sum()))
        return step(self, model, inputs, *rest)

    stage = {"kind": "sft", "group_by_length": grouped, "batch_size": 2}
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", counted)
        Run(small_runs.recipe(kind, folder / str(grouped), base, stages=[stage]), small_runs.silent())()
    return sum(padded)


@pytest.mark.parametrize("kind", ["classification", "interactions"])
def test_less_is_padded(kind: str, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random, grouped = (padding(kind, grouped, tmp_path, model_folder, monkeypatch) for grouped in (False, True))
    assert grouped < random
