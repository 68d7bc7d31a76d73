from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

import rankwise as rw
from rankwise.errors import UserError
from rankwise.ranks import AllocationCallback, importance, match_ranks
from rankwise.ranks.allocating.allocation import choose
from rankwise.ranks.allocating.callback import EVENTS
from rankwise.ranks.resizing import resize_adapter


class Sum(nn.Module):
    """Three linear layers side by side on one input: their sum, and its mean square distance from a target."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.needy, self.idle, self.content = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor, z: Tensor, labels: Tensor) -> dict[str, Tensor]:
        output = self.needy(x) + self.idle(y) + self.content(z)
        return {"loss": (output - labels).square().mean()}


def rows(number: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """The target needs a change of rank six in ``needy``, of rank one in ``content``, and none in ``idle``."""
    base, generator = Sum(), torch.Generator().manual_seed(100)
    left, right = torch.linalg.qr(torch.randn(2, 8, 8, generator=generator)).Q
    changes = {"needy": left[:, :6] @ right[:6], "content": 1.5 * torch.outer(left[7], right[7])}
    x, y, z = torch.randn(3, number, 8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        labels = x @ (base.needy.weight + changes["needy"]).T + y @ base.idle.weight.T
        labels += z @ (base.content.weight + changes["content"]).T
    return [{"x": x[i], "y": y[i], "z": z[i], "labels": labels[i]} for i in range(number)]


def adapted(**settings: Any) -> peft.PeftModel:
    torch.manual_seed(1)
    chosen = {"r": 3, "lora_alpha": 6, "target_modules": ["needy", "idle", "content"]} | settings
    return peft.get_peft_model(Sum(), peft.LoraConfig(**chosen))


def trainer(model: nn.Module, folder: Path, held: Any = True, **changes: Any) -> Trainer:
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 64,
        "max_steps": 100,
        "learning_rate": 2e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "label_names": ["labels"],
        "remove_unused_columns": False,
    }
    arguments = TrainingArguments(**settings | changes)
    evaluation = rows(128, seed=1) if held is True else held
    return Trainer(model=model, args=arguments, train_dataset=rows(160), eval_dataset=evaluation)


def ranks(model: peft.PeftModel) -> dict[str, int]:
    layers = {name: getattr(model.get_base_model(), name) for name in ("needy", "idle", "content")}
    return {name: layer.r["default"] if hasattr(layer, "r") else 0 for name, layer in layers.items()}


def trained(folder: Path, **settings: Any) -> tuple[peft.PeftModel, AllocationCallback]:
    model = adapted()
    made = trainer(model, folder)
    callback = AllocationCallback(made, **settings)
    made.add_callback(callback)
    made.train()
    return model, callback


@torch.no_grad()
def loss_of(model: nn.Module) -> float:
    held = rows(128, seed=2)
    return float(model(**{name: torch.stack([row[name] for row in held]) for name in held[0]})["loss"])


def test_rank_goes_where_it_is_needed(tmp_path: Path) -> None:
    """Nine directions, of which the layer that needs six gets most; the idle layer loses most or all of its own."""
    model, callback = trained(tmp_path, events=4, share=0.12, first=0.2, last=0.6)
    found = ranks(model)
    assert sum(found.values()) == 9
    assert found["needy"] >= 5 and found["idle"] <= 2 and found["content"] >= 1
    plain = adapted()
    trainer(plain, tmp_path).train()
    assert loss_of(model) < 0.5 * loss_of(plain)
    assert [event.step for event in callback.history] == [20, 33, 47, 60]


def test_history_tells_what_was_moved(tmp_path: Path) -> None:
    model, callback = trained(tmp_path, events=4, share=0.12, first=0.2, last=0.6)
    before = dict.fromkeys(("needy", "idle", "content"), 3)
    for event in callback.history:
        assert event.ranks_before == before and event.moved == 1
        assert sum(event.ranks.values()) == 9
        assert event.lowest <= event.highest_cut <= event.highest and event.seconds >= 0
        assert event.removed == tuple(name for name, rank in event.ranks.items() if not rank)
        before = {name: rank for name, rank in event.ranks.items() if rank}
    assert before == {name: rank for name, rank in ranks(model).items() if rank}
    assert model.peft_config["default"].rank_pattern == before


def test_what_is_trained_is_plain_lora(tmp_path: Path) -> None:
    model, _ = trained(tmp_path / "run", events=3, share=0.3)
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(Sum(), tmp_path / "adapter")
    assert type(loaded.peft_config["default"]) is peft.LoraConfig
    assert loss_of(loaded) == pytest.approx(loss_of(model), abs=1e-6)
    rw.export(model, tmp_path / "export")
    exported = peft.PeftModel.from_pretrained(Sum(), tmp_path / "export")
    assert loss_of(exported) == pytest.approx(loss_of(model), abs=1e-5)


def test_a_training_is_that_of_a_loop_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches in order, Adam, a move after the second and the third step, each on its batch of evaluation."""
    model, expected = adapted(), adapted()
    train, held = rows(160), rows(128, seed=1)
    made = trainer(model, tmp_path, max_steps=5, max_grad_norm=1e9, train_sampling_strategy="sequential")
    made.add_callback(AllocationCallback(made, events=2, share=0.3, first=0.4, last=0.6))
    # New rows of A are not drawn from here on, so that both are given the same.
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda new, low, high: new.fill_(high / 3))
    made.train()
    optimizer = torch.optim.AdamW([p for p in expected.parameters() if p.requires_grad], lr=2e-2, weight_decay=0.0)

    def batch(part: list[dict[str, Tensor]], start: int, size: int) -> dict[str, Tensor]:
        return {name: torch.stack([row[name] for row in part[start : start + size]]) for name in part[0]}

    for step in range(1, 6):
        optimizer.zero_grad()
        expected(**batch(train, 16 * (step - 1), 16))["loss"].backward()
        optimizer.step()
        if step in (2, 3):
            scored = batch(held, 64 * (step - 2), 64)
            scores = importance(expected, lambda one, scored=scored: one(**scored)["loss"])
            resize_adapter(expected, *choose(scores, 3), optimizer)
    assert ranks(model) == ranks(expected) != dict.fromkeys(ranks(model), 3)
    for (name, value), (other, found) in zip(expected.named_parameters(), model.named_parameters(), strict=True):
        assert name == other
        torch.testing.assert_close(found, value, atol=1e-6, rtol=0)


def test_a_training_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    """Of the same values as one that was not stopped, in which a layer lost its adapter before the checkpoint."""
    settings = {"events": 4, "share": 0.35, "first": 0.2, "last": 0.8}

    def run(model: peft.PeftModel, folder: Path, checkpoint: str | None = None, **changes: Any) -> AllocationCallback:
        made = trainer(model, folder, max_steps=20, save_strategy="steps", save_steps=10, **changes)
        callback = AllocationCallback(made, **settings)
        made.add_callback(callback)
        made.train(resume_from_checkpoint=checkpoint)
        return callback

    whole = adapted()
    events = run(whole, tmp_path / "whole").history
    assert events[1].removed or events[0].removed
    checkpoint = tmp_path / "whole" / "checkpoint-10"
    saved = json.loads((checkpoint / "adapter_config.json").read_text())["rank_pattern"]
    assert saved == {name: rank for name, rank in events[1].ranks.items() if rank}
    resumed = adapted()
    match_ranks(resumed, checkpoint)
    rest = run(resumed, tmp_path / "resumed", str(checkpoint)).history
    assert [event.step for event in rest] == [12, 16]
    kept = AllocationCallback(trainer(adapted(), tmp_path / "kept"), **settings)
    callback = AllocationCallback(trainer(adapted(), tmp_path / "other"), **settings)
    kept.history = rest
    kept.save_beside(tmp_path, 0)
    callback.load_beside(tmp_path, 0)
    assert callback.history == rest
    for damaged in ("[", "{}", "[3]", '[{"step": 1}]', '[{"step": "x", "moved": 1}]'):
        (tmp_path / EVENTS).write_text(damaged, encoding="utf-8")
        with pytest.raises(UserError, match=r"allocation_events.json .*: resume from another checkpoint"):
            callback.load_beside(tmp_path, 0)
    assert callback.history == rest
    assert [event.ranks for event in rest] == [event.ranks for event in events[2:]]
    expected, found = whole.state_dict(), resumed.state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"events": 0}, "events 0 is not possible"),
        ({"share": 0.0}, "share 0.0 is not possible: it must be above 0 and below 1"),
        ({"share": 1.0}, "share 1.0 is not possible"),
        ({"first": 0.5, "last": 0.4}, "first 0.5 and last 0.4 are not possible"),
        ({"last": 1.0}, "last 1.0 are not possible"),
    ],
)
def test_a_value_out_of_range_is_refused_at_once(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    made = trainer(adapted(), tmp_path)
    with pytest.raises(UserError, match=message):
        AllocationCallback(made, **settings)


@pytest.mark.parametrize("held", [None, [], {"a": [1], "b": [2]}])
def test_rows_to_score_on_are_needed(tmp_path: Path, held: Any) -> None:
    made = trainer(adapted(), tmp_path)
    made.eval_dataset = held
    with pytest.raises(UserError, match="not trained on: give the trainer one eval_dataset"):
        AllocationCallback(made)


def begin(model: nn.Module, folder: Path, **settings: Any) -> None:
    made = trainer(model, folder)
    callback = AllocationCallback(made, **settings)
    callback.on_train_begin(made.args, TrainerState(max_steps=made.args.max_steps), TrainerControl(), model=model)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (rw.MiloraConfig(r=2, target_modules=["needy"]), "'default' is MiloraConfig: make it with peft.LoraConfig"),
        (rw.SoraConfig(r=2, target_modules=["needy"]), "'default' is SoraConfig: make it with peft.LoraConfig"),
        (peft.LoraConfig(r=1, target_modules=["needy"]), "1 of 1 directions cannot be moved"),
    ],
    ids=["frozen start", "gates", "one direction"],
)
def test_another_adapter_is_refused_when_training_begins(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        begin(peft.get_peft_model(Sum(), config), tmp_path)


def test_more_events_than_steps_are_refused_when_training_begins(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be moved 90 times from 0.2 to 0.7 of a training of 100 steps"):
        begin(adapted(), tmp_path, events=90)


def test_more_directions_than_there_are_cannot_be_moved(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"9 of 9 directions cannot be moved"):
        begin(adapted(), tmp_path, share=0.99)


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, model = trainer(adapted(), tmp_path), adapted()
    callback = AllocationCallback(made)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match="allocating LoRA in a training of 2 processes is not possible"):
        callback.on_train_begin(made.args, TrainerState(max_steps=100), TrainerControl(), model=model)
