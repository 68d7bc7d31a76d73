"""Trainings that are stopped in the middle of a stage, and what their checkpoints hold."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import small_runs
from rankwise.checkpoints import CheckpointedTrainer
from rankwise.checkpoints.resuming import CHECKPOINTS, checkpoints_of
from rankwise.checkpoints.state_file import read_state, write_state
from rankwise.errors import UserError
from rankwise.files import MANIFEST
from rankwise.run import Run

SHORT = small_runs.SFT | {"epochs": 3, "batch_size": 4}
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "steps_timed")
ADALORA = {"kind": "adalora", "r": 2, "initial_rank": 4, "every": 2, "warmup_share": 0.1, "final_share": 0.3}
ALLOCATING = {"kind": "allocating_lora", "r": 2, "events": 2, "share": 0.3, "validation_rows": 6}
SORA = {"kind": "sora", "r": 4, "target_ratio": 0.5, "gate_lr": 0.05, "part": "minor"}
DPO = small_runs.DPO | {"name": "softmax-DPO", "negatives": 3, "batch_size": 4}
HARD = small_runs.DPO | {
    "name": "softmax-DPO",
    "negatives": 3,
    "draw": "hard",
    "mine_every": 2,
    "rows": 32,
    "batch_size": 4,
}

# A name, the kind of data, and what of the recipe is another: the stage that is stopped is the last.
CUT = {"kind": "sora", "r": 4, "threshold": 0.05, "gate_lr": 0.05, "shrink_after": 1}
IN_BATCH = DPO | {"draw": "in-batch", "epochs": 2}
LATER = {"milora, dropout, batches by length": 11, "sora that is cut": 14, "answers of the batch": 5}  # first stop

STOPPED: dict[str, tuple[str, dict[str, Any]]] = {
    "milora, dropout, batches by length": (
        "text",
        {
            "adapter": {"kind": "milora", "r": 4, "dropout": 0.2},
            "stages": [SHORT | {"group_by_length": True, "batch_size": 1, "epochs": 8}],
        },
    ),
    "accumulated batches": (
        "instructions",
        {"stages": [SHORT | {"batch_size": 2, "accumulation": 3}], "adapter": {"kind": "lora", "r": 4, "dropout": 0.1}},
    ),
    "adalora": ("instructions", {"adapter": ADALORA, "stages": [SHORT | {"epochs": 6}]}),
    "allocating_lora": ("instructions", {"adapter": ALLOCATING, "stages": [SHORT | {"epochs": 5}]}),
    "sora with a budget": ("classification", {"adapter": SORA}),
    "sora that is cut": ("classification", {"adapter": CUT}),
    "answers of the batch": ("interactions", {"stages": [small_runs.SFT, IN_BATCH]}),
    "full": ("classification", {"adapter": {"kind": "full"}, "stages": [SHORT | {"learning_rate": 1e-3}]}),
    "prefix": ("instructions", {"adapter": {"kind": "prefix"}, "stages": [SHORT]}),
    "softmax-DPO after sft": ("interactions", {"stages": [small_runs.SFT, DPO]}),
    "hard answers": ("interactions", {"stages": [small_runs.SFT, HARD]}),
}


class Crash(RuntimeError):
    pass


def stop_after(saves: int, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lights go out when a stage has written so many checkpoints."""
    exact, count = CheckpointedTrainer._save_checkpoint, []

    def stopping(self: CheckpointedTrainer, *args: Any) -> None:
        exact(self, *args)
        assert self.checkpoint_folder is not None
        if self.checkpoint_folder.name == stage:
            count.append(1)
        if len(count) == saves:
            raise Crash

    monkeypatch.setattr(CheckpointedTrainer, "_save_checkpoint", stopping)


def logged(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def contents(folder: Path) -> dict[str, Any]:
    """Files by their hashes, a config by what it says: PEFT writes sets in any order; without the manifests."""
    found: dict[str, Any] = small_runs.hashes(folder)
    for name in found:
        if name.endswith("adapter_config.json"):
            config = json.loads((folder / name).read_text(encoding="utf-8"))
            found[name] = {key: sorted(value) if isinstance(value, list) else value for key, value in config.items()}
    return {name: value for name, value in found.items() if Path(name).name != MANIFEST}


@pytest.mark.parametrize("name", STOPPED)
def test_a_training_that_was_stopped_within_a_stage_ends_as_one_that_was_not(
    name: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, changes = STOPPED[name]
    whole = small_runs.recipe(kind, tmp_path / "whole", model_folder, **changes)
    expected = Run(whole, small_runs.silent())()
    again = whole.model_copy(update={"output": str(tmp_path / "stopped"), "checkpoint_seconds": 0.0})
    last = whole.stages[-1].name
    first = LATER.get(name, 2)
    for saves in (first, 1):
        with monkeypatch.context() as patch:
            stop_after(saves, last, patch)
            with pytest.raises(Crash):
                Run(again, small_runs.silent())()
    assert [path.name for path in checkpoints_of(Path(again.output), last).iterdir()] == [f"checkpoint-{first + 1}"]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = Run(again, small_runs.silent())()
    assert not [str(one.message) for one in warned if "rankwise" in one.filename]
    assert found["rows"] == expected["rows"]
    assert found["counts"] == expected["counts"]
    for part in ("adapter", "stages"):
        assert contents(Path(again.output) / part) == contents(Path(whole.output) / part)
    assert logged(Path(again.output)) == logged(Path(whole.output))
    assert not (Path(again.output) / CHECKPOINTS).exists()


def test_states_of_every_kind_come_back_as_they_were(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    state = {
        "state": {
            0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(3, 2, generator=generator, dtype=torch.bfloat16)}
        },
        "groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "maximize": False, "name": None, "params": [0, 1]}],
        "views": [torch.arange(6)[::2], torch.empty(0, 3)],
        "infinite": float("inf"),
    }
    write_state(tmp_path / "state.safetensors", state)
    found = read_state(tmp_path / "state.safetensors")
    torch.testing.assert_close(found, state, rtol=0, atol=0)
    assert isinstance(found["groups"][0]["betas"], tuple) and found["state"].keys() == {0}


@pytest.mark.parametrize("value", [object(), {1.5: 2}, [{"a": print}]])
def test_what_is_no_state_is_not_kept(tmp_path: Path, value: Any) -> None:
    with pytest.raises(TypeError):
        write_state(tmp_path / "state.safetensors", value)


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    write_state(path, {"a": torch.ones(2)})
    good = path.read_bytes()
    other = [good.replace(b"mapping", b"mappinG"), good.replace(b"tensor", b"tensoR"), good.replace(b"mapp", b"mopp")]
    for content in (good[:-3], b"", *other):
        path.write_bytes(content)
        with pytest.raises(UserError, match="holds no state of a training"):
            read_state(path)
