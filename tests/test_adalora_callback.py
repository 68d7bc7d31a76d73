from __future__ import annotations

import shutil

import peft
import pytest
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import tiny
import tiny_adalora
from rankwise.analysis import read_adapter
from rankwise.errors import UserError
from rankwise.ranks import AdaloraCallback, adalora_ranks
from tiny_adalora import STEPS, adapt, factors, live, trainer


class PeftsOwn(TrainerCallback):
    """The reference: PEFT's own call after each optimizer step."""

    def on_optimizer_step(self, args, state, control, model=None, **_):
        model.base_model.update_and_allocate(state.global_step + 1)


def assert_same(model: torch.nn.Module, other: torch.nn.Module) -> None:
    for name, value in factors(other).items():
        torch.testing.assert_close(factors(model)[name], value, atol=1e-6, rtol=1e-6)


def test_ranks_change_under_the_trainer(tmp_path):
    """With accumulation 2 and clipping: the budget is met, layers differ, and all is as PEFT's allocator has it."""
    model, reference, callback = adapt(), adapt(), AdaloraCallback()
    made = trainer(model, tmp_path, callback)
    made.train()
    trainer(reference, tmp_path, PeftsOwn()).train()
    assert made.state.global_step == STEPS
    assert sum(adalora_ranks(model).values()) == 2 * 6
    assert len(set(adalora_ranks(model).values())) > 1
    assert adalora_ranks(model) == live(reference)
    assert_same(model, reference)
    assert [one.step for one in callback.history] == list(range(4, 11))
    assert callback.history[-1].live == callback.history[-1].budget == 12


def test_what_the_trainer_saves_holds_the_ranks(tmp_path):
    model = adapt()
    made = trainer(model, tmp_path, AdaloraCallback())
    made.train()
    made.save_model(str(tmp_path / "saved"))
    rows, _ = read_adapter(tmp_path / "saved")
    assert {row["module"]: row["rank"] for row in rows} == adalora_ranks(model)
    loaded = peft.PeftModel.from_pretrained(tiny.make("llama"), tmp_path / "saved")
    torch.testing.assert_close(tiny.logits(loaded), tiny.logits(model.eval()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("step", [2, 6, 12])
def test_a_resumed_run_ends_as_one_without_interruption(tmp_path, step):
    """In the warm-up, while ranks fall, and when they stay; into a new model, as a new process would."""
    whole, callback = adapt(), AdaloraCallback()
    trainer(whole, tmp_path, callback, save_strategy="steps", save_steps=step).train()
    resumed, again = adapt(), AdaloraCallback()
    made = trainer(resumed, tmp_path, again)
    made.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert adalora_ranks(resumed) == adalora_ranks(whole)
    assert_same(resumed, whole)
    assert again.history == callback.history
    assert resumed.peft_config["default"].rank_pattern == whole.peft_config["default"].rank_pattern


def test_without_the_saved_importance_a_resumed_run_would_end_elsewhere(tmp_path, monkeypatch):
    """The test above can fail: with empty averages other directions are cut."""
    whole = adapt()
    trainer(whole, tmp_path, AdaloraCallback(), save_strategy="steps", save_steps=6).train()
    monkeypatch.setattr("rankwise.ranks.adalora.allocation.AdaloraAllocation.load", lambda *_: None)
    resumed = adapt()
    trainer(resumed, tmp_path, AdaloraCallback()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert not torch.equal(tiny.logits(resumed), tiny.logits(whole))


def test_pefts_own_checkpoint_of_mid_training_fits_no_new_adapter(tmp_path):
    """A fact of PEFT 0.21 that the docs state: it cuts what it saves, and the new adapter is whole."""
    trainer(adapt(), tmp_path, PeftsOwn(), save_strategy="steps", save_steps=6).train()
    with pytest.raises(RuntimeError, match="size mismatch"):
        trainer(adapt(), tmp_path, PeftsOwn()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_a_checkpoint_that_was_moved_is_named(tmp_path):
    trainer(adapt(), tmp_path / "run", AdaloraCallback(), save_strategy="steps", save_steps=6).train()
    shutil.move(tmp_path / "run" / "checkpoint-6", tmp_path / "moved")
    with pytest.raises(UserError, match=r"adalora\.safetensors does not exist, .*\(checkpoint=\.\.\.\)"):
        trainer(adapt(), tmp_path / "new", AdaloraCallback()).train(resume_from_checkpoint=str(tmp_path / "moved"))
    model = adapt()
    callback = AdaloraCallback(checkpoint=tmp_path / "moved")
    trainer(model, tmp_path / "new", callback).train(resume_from_checkpoint=str(tmp_path / "moved"))
    assert sum(adalora_ranks(model).values()) == 12


def test_a_checkpoint_of_another_step_is_refused(tmp_path):
    trainer(adapt(), tmp_path, AdaloraCallback(), save_strategy="steps", save_steps=4).train()
    callback = AdaloraCallback(checkpoint=tmp_path / "checkpoint-4")
    with pytest.raises(UserError, match="is of another step than 8"):
        trainer(adapt(), tmp_path, callback).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_the_wrong_number_of_steps_is_an_error_before_training(tmp_path):
    """Sixteen rows in batches of two, two batches a step, three epochs: 12 steps."""
    model = adapt()
    made = trainer(model, tmp_path, AdaloraCallback(), max_steps=-1, num_train_epochs=3)
    before = factors(model)
    with pytest.raises(UserError, match=r"total_step=14\) is not what training takes, which is 12 .* total_step=12"):
        made.train()
    assert all(torch.equal(value, before[name]) for name, value in factors(model).items())


def test_a_training_that_is_stopped_keeps_what_it_has(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 7

    model = adapt()
    with pytest.warns(UserWarning, match="training ended at step 7, before the last allocation at step 10"):
        trainer(model, tmp_path, AdaloraCallback(), Stop()).train()
    model.save_pretrained(tmp_path / "saved")
    loaded = peft.PeftModel.from_pretrained(tiny.make("llama"), tmp_path / "saved")
    assert torch.equal(tiny.logits(loaded), tiny.logits(model.eval()))


def test_weights_of_an_earlier_step_are_told(tmp_path):
    """load_best_model_at_end puts weights back that were not cut yet: they stay whole."""
    model = adapt()
    made = trainer(
        model,
        tmp_path,
        AdaloraCallback(),
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=1,
        eval_steps=1,
        metric_for_best_model="loss",
        greater_is_better=True,
        load_best_model_at_end=True,
    )
    with pytest.warns(UserWarning, match="live directions, its budget is 12: weights of a step before"):
        made.train()
    assert model.peft_config["default"].rank_pattern is None


def test_an_adapter_without_a_task_is_told_of_its_loss(tmp_path):
    with pytest.warns(UserWarning, match="has no task_type, so that PEFT leaves the orthogonality term out"):
        trainer(adapt(task_type=None), tmp_path, AdaloraCallback()).train()


def test_other_adapters_are_refused(tmp_path):
    with pytest.raises(UserError, match="is of LoraConfig: this is for"):
        trainer(tiny.adapted("llama"), tmp_path, AdaloraCallback()).train()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("fsdp", ["full_shard"], "fsdp keeps no whole gradients"),
        ("deepspeed", {"zero_optimization": {"stage": 3}}, "deepspeed keeps no whole gradients"),
        ("gradient_checkpointing_kwargs", {"use_reentrant": True}, "reentrant gradient checkpointing"),
    ],
)
def test_ways_of_training_that_hide_gradients(tmp_path, monkeypatch, name, value, message):
    arguments = tiny_adalora.arguments(tmp_path, gradient_checkpointing=True)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    setattr(arguments, name, value)
    with pytest.raises(UserError, match=message):
        AdaloraCallback().on_train_begin(arguments, TrainerState(max_steps=STEPS), TrainerControl(), model=adapt())
