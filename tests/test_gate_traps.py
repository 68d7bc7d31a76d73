"""Ways in which gates could go wrong without a word: each is refused, followed or said."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import peft
import pytest
import torch
from transformers import Trainer, TrainerCallback

import rankwise as rw
import tiny
from rankwise.errors import UserError
from rankwise.ranks import SoraCallback, attach_proximal_step, attached_steps, gate_counts, gates, resizing
from tiny_gates import Data, adapt, arguments, step, trainer


def values(model: peft.PeftModel) -> torch.Tensor:
    return torch.cat([gate.detach() for gate in gates(model).values()])


# Optimizers and their steps


def test_a_fused_optimizer_under_a_scaler_takes_the_same_steps():
    """It unscales gradients and skips steps itself, inside of step(), where the hooks have to know."""
    found = {}
    for fused in (False, True):
        model = adapt(l1=5.0, threshold=1e-3)
        optimizer = rw.sora_optimizer(model, lr=1e-3, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for number in range(3):
            scaler.scale(tiny.loss(model)).backward()
            if number == 1:
                next(iter(gates(model).values())).grad[0] = torch.inf
            before = values(model)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert torch.equal(values(model), before) == (number == 1)
        assert attached_steps(optimizer).step == 2
        found[fused] = values(model)
    torch.testing.assert_close(found[True], found[False], atol=1e-6, rtol=1e-5)


def test_a_step_with_a_closure_is_refused():
    model = adapt()
    optimizer = rw.sora_optimizer(model, torch.optim.SGD, lr=0.1)
    with pytest.raises(UserError, match=r"a step with a closure .* call step\(\) alone"):
        optimizer.step(lambda: 0.0)


def test_steps_while_another_adapter_is_active_leave_the_gates_alone():
    model = adapt(threshold=0.5)
    optimizer = rw.sora_optimizer(model, lr=1e-3)
    model.add_adapter("second", rw.SoraConfig(r=2, target_modules=["q_proj"]))
    before = values(model)
    model.set_adapter("second")
    step(model, optimizer)
    model.set_adapter("default")
    assert torch.equal(values(model), before) and attached_steps(optimizer).step == 0


def test_what_cannot_train_gates_is_refused(tmp_path):
    model = adapt()
    optimizer = rw.sora_optimizer(model, lr=1e-3)
    with pytest.raises(UserError, match="takes a proximal step already"):
        attach_proximal_step(optimizer, model)
    others = [p for name, p in model.named_parameters() if p.requires_grad and "gate" not in name]
    with pytest.raises(UserError, match=r"q_proj: the optimizer does not have its gate: use rankwise\.sora_optimizer"):
        attach_proximal_step(torch.optim.Adam(others), model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny.make("llama"), tmp_path)
    with pytest.raises(UserError, match="its gate is not trained: load the adapter with is_trainable=True"):
        rw.sora_optimizer(loaded, lr=1e-3)
    with pytest.raises(UserError, match="total_steps 0 is not possible"):
        rw.sora_optimizer(adapt(target_ratio=0.5), lr=1e-3, total_steps=0)
    with pytest.raises(UserError, match=r"gates of torch\.bfloat16 cannot be shrunk by small thresholds"):
        rw.sora_optimizer(adapt().bfloat16(), lr=1e-3)


def test_a_kept_direction_of_a_layer_with_biases_is_cut_at_no_step(monkeypatch):
    model = adapt(bias="lora_only", shrink_after=1, threshold=0.0)
    optimizer = rw.sora_optimizer(model, torch.optim.SGD, lr=0.0)
    next(iter(gates(model).values())).data.zero_()
    step(model, optimizer)
    assert next(iter(gates(model).values())).shape == (1,)
    monkeypatch.setattr(resizing, "update_config", lambda *_: pytest.fail("a step changed ranks"))
    step(model, optimizer)


def test_removed_layers_are_named():
    model = adapt(shrink_after=1, threshold=0.0)
    optimizer = rw.sora_optimizer(model, lr=0.0)
    name, gate = next(iter(gates(model).items()))
    gate.data.zero_()
    gate.requires_grad_(True)
    step(model, optimizer)
    assert attached_steps(optimizer).removed == [name]


# Budgets and configs


@pytest.mark.parametrize("steps", [1, 2, 4, 30])
def test_equal_gates_meet_a_budget_too(steps):
    """Which of them go is their order; those that stay keep a size from which training can go on."""
    model = adapt(gate_init="ones", target_ratio=0.5, budget_by=1.0)
    optimizer = rw.sora_optimizer(model, torch.optim.SGD, lr=0.0, total_steps=steps)
    for _ in range(steps):
        step(model, optimizer)
    assert 396 - 25 < gate_counts(model)["parameters_left"] <= 396
    assert values(model)[values(model) != 0].min() >= 1 / steps - 1e-6


def test_a_changed_budget_counts():
    used = adapt(target_ratio=0.25).peft_config["default"]
    changed = dataclasses.replace(used, r=8, target_ratio=0.5, rank_pattern={}, alpha_pattern={})
    model = peft.get_peft_model(tiny.make("llama"), changed)
    assert model.peft_config["default"].budget == 792
    model.peft_config["default"].target_ratio = 0.75
    assert attached_steps(rw.sora_optimizer(model, lr=1e-3, total_steps=10)).budget.target == 1188


def test_a_config_that_was_read_apart_keeps_the_budget(tmp_path):
    """``PeftModel.from_pretrained(base, folder, config=PeftConfig.from_pretrained(folder))``, a usual way."""
    model = adapt(r=8, target_ratio=0.5, threshold=0.0)
    optimizer = rw.sora_optimizer(model, lr=5e-3, total_steps=4)
    for _ in range(4):
        step(model, optimizer)
    rw.prune(model)
    model.save_pretrained(tmp_path)
    read = peft.PeftConfig.from_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny.make("llama"), tmp_path, config=read, is_trainable=True)
    config = loaded.peft_config["default"]
    assert (config.initial_gates, config.initial_parameters, config.budget) == (48, 1584, 792)
    fresh = peft.get_peft_model(tiny.make("llama"), dataclasses.replace(config, rank_pattern={}, alpha_pattern={}, r=4))
    assert (fresh.peft_config["default"].initial_gates, fresh.peft_config["default"].budget) == (24, 396)


def test_a_longer_training_after_a_resume_keeps_what_is_there_now(tmp_path):
    model = adapt(r=8, target_ratio=0.5, threshold=0.0, shrink_after=2)
    optimizer = rw.sora_optimizer(model, lr=5e-3, total_steps=8)
    for _ in range(4):
        step(model, optimizer)
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    for _ in range(6):
        step(model, optimizer)
    steps = attached_steps(optimizer)
    steps.set_total_steps(40)
    assert steps.budget.support is not None and len(steps.budget.path) == 4
    step(model, optimizer)


def test_an_adapter_of_the_same_config_object_has_a_copy():
    model = adapt(target_ratio=0.5, shrink_after=1, threshold=0.0)
    optimizer = rw.sora_optimizer(model, lr=5e-3, total_steps=8)
    for _ in range(8):
        step(model, optimizer)
    assert sum(gate.numel() for gate in gates(model).values()) < 24
    with pytest.warns(UserWarning, match="is made as its copy"):
        model.add_adapter("reference", model.peft_config["default"])
    own, copied = model.peft_config["default"], model.peft_config["reference"]
    assert copied is not own
    assert (own.initial_gates, own.budget, copied.initial_gates) == (24, 396, 24)
    assert {name: gate.numel() for name, gate in gates(model, "reference").items()} == {
        name: gate.numel() for name, gate in gates(model).items()
    }


def test_pruning_says_where_no_gate_was_ever_closed():
    model = tiny.train(adapt(target_ratio=0.5))
    with pytest.warns(UserWarning, match="none of 24 gates is closed, so nothing is pruned"):
        rw.prune(model)


def test_tied_modules_keep_their_ranks():
    with pytest.raises(UserError, match=r"SoraConfig\(ensure_weight_tying=True\) is not available"):
        rw.SoraConfig(r=4, target_modules=["embed_tokens"], ensure_weight_tying=True)
    plain = peft.get_peft_model(tiny.make("llama"), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    plain.peft_config["default"].ensure_weight_tying = True
    with pytest.raises(UserError, match="ensure_weight_tying=True shares factors"):
        resizing.resize_adapter(plain, {}, {"model.layers.0.self_attn.q_proj": 1})


# Under a trainer


def test_a_second_training_keeps_a_budget_that_was_met(tmp_path):
    model = adapt(r=8, target_ratio=0.5, threshold=0.0)
    trainer(tmp_path / "one", model).train()
    closed = values(model) == 0
    second = trainer(tmp_path / "two", model, max_steps=3)
    second.train()
    assert torch.equal(values(model) == 0, closed) and attached_steps(second.optimizer).step == 3


def test_the_trainers_own_length_counts_and_a_missed_budget_is_said(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 4

    model = adapt(target_ratio=0.5, threshold=0.0)
    optimizer = rw.sora_optimizer(model, lr=1e-3, total_steps=1000)
    made = Trainer(
        model,
        arguments(tmp_path),
        train_dataset=Data(),
        optimizers=(optimizer, None),
        callbacks=[SoraCallback(), Stop()],
    )
    with pytest.warns(UserWarning, match=r"budget of 396 parameters is not met.*at step 6, and 4 were taken"):
        made.train()
    assert made.state.log_history[0]["gates_left"] <= 24 and "parameters_target" in made.state.log_history[0]


def test_the_best_checkpoint_is_not_to_be_loaded_after_cuts(tmp_path: Path):
    settings = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 6}
    model = adapt(shrink_after=2)
    made = trainer(tmp_path, model, **settings)
    with pytest.raises(UserError, match="load_best_model_at_end would load a checkpoint from before"):
        made.train()


def test_weights_that_were_loaded_back_miss_the_budget_aloud(tmp_path: Path):
    class Reopen(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            if state.global_step == 12:
                for gate in gates(model).values():
                    gate.data.fill_(1.0)

    model = adapt(target_ratio=0.5, threshold=0.0)
    made = trainer(tmp_path, model)
    made.add_callback(Reopen())
    with pytest.warns(UserWarning, match="is not met, 792 are left: weights from before it was met were loaded back"):
        made.train()


def test_the_callback_lets_other_models_pass(tmp_path: Path):
    settings = arguments(tmp_path, max_steps=1)
    Trainer(tiny.make("llama"), settings, train_dataset=Data(), callbacks=[SoraCallback()]).train()
