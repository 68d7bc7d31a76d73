from __future__ import annotations

import copy

import peft
import pytest
import torch
from transformers import Trainer

import rankwise as rw
import tiny
from rankwise.errors import UserError
from rankwise.ranks import SoraCallback, attached_steps, gate_counts, gates
from tiny_gates import Data, adapt, arguments, step, trainer


def test_an_interrupted_training_goes_on_as_if_it_had_not_been(tmp_path):
    """The adapter from its folder and the optimizer from its state dict, after cuts and in the middle of a budget."""
    settings = {"r": 8, "target_ratio": 0.4, "shrink_after": 3, "threshold": 0.0}
    whole = adapt(**settings)
    optimizer = rw.sora_optimizer(whole, lr=5e-3, total_steps=40)
    for number in range(40):
        step(whole, optimizer)
        if number == 14:
            whole.save_pretrained(tmp_path)
            torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed = peft.PeftModel.from_pretrained(tiny.make("llama"), tmp_path, is_trainable=True)
    assert sum(gate.numel() for gate in gates(resumed).values()) < 48 == gate_counts(resumed)["gates"]
    assert resumed.peft_config["default"].initial_gates == 48
    optimizer = rw.sora_optimizer(resumed, lr=5e-3, total_steps=40)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for _ in range(25):
        step(resumed, optimizer)
    assert gates(resumed).keys() == gates(whole).keys()
    for name, gate in gates(resumed).items():
        torch.testing.assert_close(gate, gates(whole)[name], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(tiny.logits(resumed), tiny.logits(whole), atol=1e-6, rtol=1e-5)


def test_resuming_with_another_r_is_refused(tmp_path):
    model = adapt(r=4)
    optimizer = rw.sora_optimizer(model, lr=1e-3)
    step(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    other = rw.sora_optimizer(adapt(r=6), lr=1e-3)
    with pytest.raises(UserError, match=r"adapter with r=4 and 24 gates, this one began with r=6 and 36"):
        other.load_state_dict(saved)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="the checkpoint has 4 directions, this adapter 2: it was begun with another"):
        adapt(r=2).load_adapter(str(tmp_path), "default")


@pytest.mark.parametrize(
    "more",
    [{}, {"made_before": True}, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}],
    ids=str,
)
def test_through_the_trainer_with_a_resume(tmp_path, more):
    """A run that is stopped and resumed ends as one that is not, cuts and budget included."""
    settings = {"r": 8, "target_ratio": 0.5, "shrink_after": 2, "threshold": 0.0, "budget_by": 0.75}
    whole = adapt(**settings)
    whole_trainer = trainer(tmp_path / "whole", whole, **more)
    whole_trainer.train()
    steps = attached_steps(whole_trainer.optimizer)
    assert steps.step == 12 and steps.budget.steps == 9 and steps.budget.support is not None
    counts = gate_counts(whole)
    assert counts["parameters_left"] <= whole.peft_config["default"].budget < 2 * counts["parameters_left"]
    groups = whole_trainer.optimizer.param_groups
    assert groups[1]["weight_decay"] == 0 and groups[0]["weight_decay"] == 0.1
    assert groups[1]["initial_lr"] == 1e-2

    resumed = adapt(**settings)
    with pytest.warns(UserWarning, match="are not in the checkpoint: they are cut"):
        trainer(tmp_path / "whole", resumed, **more).train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-6"))
    for name, gate in gates(resumed).items():
        torch.testing.assert_close(gate, gates(whole)[name], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(tiny.logits(resumed.eval()), tiny.logits(whole.eval()), atol=1e-6, rtol=1e-5)


def test_a_trainer_that_would_close_no_gate_is_refused(tmp_path):
    model = adapt()
    made = Trainer(model, arguments(tmp_path), train_dataset=Data(), callbacks=[SoraCallback()])
    with pytest.raises(UserError, match=r"takes no proximal step, so that no gate would close.*sora_optimizer"):
        made.train()
