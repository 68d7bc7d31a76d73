from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import trl
from datasets import Dataset
from torch import nn
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import rankwise as rw
import tiny

TARGETS = ["q_proj", "v_proj", "down_proj"]
PAIRS = [
    {"prompt": "The cat sat", "chosen": " on the mat.", "rejected": " in a name."},
    {"prompt": "A river had", "chosen": " a name.", "rejected": " the cat, the mat and the dog."},
    {"prompt": "Once there", "chosen": " was a river", "rejected": " sat"},
    {"prompt": "The dog", "chosen": " ran.", "rejected": " was, was and was."},
]
TEXTS = [{"text": row["prompt"] + row["chosen"]} for row in PAIRS]


@pytest.fixture
def make(model_folder: Path):
    """The small Llama, as often as it is needed."""

    def made(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(model_folder, dtype=dtype).eval()

    return made


def milora(**settings: Any) -> rw.MiloraConfig:
    return rw.MiloraConfig(**{"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | settings)


def settings(folder: Path, steps: int, **changes: Any) -> dict[str, Any]:
    common = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": steps,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }
    return common | changes


ROWS = [{"input_ids": list(range(5 + i, 13 + i)), "labels": list(range(5 + i, 13 + i))} for i in range(8)]


def trainer(model: nn.Module, folder: Path, steps: int = 4, **changes: Any) -> Trainer:
    callbacks = changes.pop("callbacks", None)
    arguments = TrainingArguments(**settings(folder, steps, **changes))
    return Trainer(model=model, args=arguments, train_dataset=ROWS, callbacks=callbacks)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if ".lora_" in name}


@pytest.mark.parametrize("route", ["fresh adapter", "loaded adapter"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_and_two_steps_are_four(tmp_path, make, dtype, route):
    """A run that is taken up from its checkpoint ends with the same bits as one that was never stopped."""
    whole = peft.get_peft_model(make(dtype), milora())
    before = state(whole)
    trainer(whole, tmp_path / "whole").train()
    assert not torch.equal(state(whole)[next(iter(before))], before[next(iter(before))])
    trainer(peft.get_peft_model(make(dtype), milora()), tmp_path / "halves", steps=2).train()
    halfway = tmp_path / "halves" / "checkpoint-2"
    halves = (
        peft.get_peft_model(make(dtype), milora()) if route == "fresh adapter" else tiny.resume(make(dtype), halfway)
    )
    trainer(halves, tmp_path / "halves").train(resume_from_checkpoint=str(halfway))
    tiny.assert_same_adapter(whole, halves)


def test_a_trainers_checkpoint_is_plain_lora(tmp_path, make):
    model = peft.get_peft_model(make(), milora())
    trainer(model, tmp_path, steps=2).train()
    plain = peft.PeftModel.from_pretrained(make(), tmp_path / "checkpoint-2")
    torch.testing.assert_close(tiny.logits(plain), tiny.logits(model.eval()), atol=1e-5, rtol=1e-5)
    assert (tiny.logits(plain) - tiny.logits(make())).abs().max() > 1e-3


class BaseIsUntouched(TrainerCallback):
    """Compares the base's weights at every step; raises in the middle where it is asked to."""

    def __init__(self, weights: dict[str, torch.Tensor], crash: bool = False) -> None:
        self.weights, self.crash, self.seen = weights, crash, 0

    def on_step_end(self, args, state, control, model, **_):
        assert_untouched(model, self.weights)
        self.seen += 1
        if self.crash and self.seen == 2:
            raise RuntimeError("power cut")


def assert_untouched(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    found = tiny.base_weights(model)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient checkpointing"])
def test_the_base_is_the_same_before_during_and_after(tmp_path, make, checkpointing):
    base = make()
    weights, expected = tiny.base_weights(base), tiny.logits(base)
    model = peft.get_peft_model(base, milora())
    assert_untouched(model, weights)
    watch = BaseIsUntouched(weights)
    trainer(model, tmp_path / "run", callbacks=[watch], gradient_checkpointing=checkpointing).train()
    assert watch.seen == 4
    rw.export(model, tmp_path / "export")
    assert_untouched(model, weights)
    with model.eval().disable_adapter():
        assert torch.equal(tiny.logits(model), expected)


def test_gradient_checkpointing_trains_the_same(tmp_path, make):
    models = [peft.get_peft_model(make(), milora()) for _ in range(2)]
    for model, checkpointing in zip(models, (False, True), strict=True):
        trainer(model, tmp_path / str(checkpointing), gradient_checkpointing=checkpointing).train()
    for name, value in state(models[0]).items():
        torch.testing.assert_close(state(models[1])[name], value, atol=1e-5, rtol=1e-4)


def test_the_base_is_the_same_after_a_crash(tmp_path, make):
    base = make()
    weights, expected = tiny.base_weights(base), tiny.logits(base)
    model = peft.get_peft_model(base, milora())
    with pytest.raises(RuntimeError, match="power cut"):
        trainer(model, tmp_path, callbacks=[BaseIsUntouched(weights, crash=True)], save_steps=1).train()
    assert_untouched(model, weights)
    with model.eval().disable_adapter():
        assert torch.equal(tiny.logits(model), expected)
    resumed = peft.get_peft_model(make(), milora())
    trainer(resumed, tmp_path).train(resume_from_checkpoint=True)
    assert_untouched(resumed, weights)


def test_supervised_fine_tuning_of_trl(tmp_path, make, tiny_tokenizer):
    base = make()
    weights = tiny.base_weights(base)
    run = trl.SFTTrainer(
        model=base,
        args=trl.SFTConfig(**settings(tmp_path, 4), max_length=32),
        train_dataset=Dataset.from_list(TEXTS),
        processing_class=tiny_tokenizer,
        peft_config=milora(),
        callbacks=[BaseIsUntouched(weights)],
    )
    assert run.args.gradient_checkpointing
    run.train()
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert_untouched(run.model, weights)
    tiny.assert_same_adapter(run.model, tiny.resume(make(), tmp_path / "checkpoint-4"))


def dpo(model: nn.Module, tokenizer, folder: Path, steps: int = 1, **changes: Any) -> trl.DPOTrainer:
    given = {"peft_config": changes.pop("peft_config")} if "peft_config" in changes else {}
    return trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(**settings(folder, steps, **changes)),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
        **given,
    )


def references(run: trl.DPOTrainer) -> torch.Tensor:
    """Log-probabilities of the reference for one batch."""
    batch = next(iter(run.get_train_dataloader()))
    return torch.cat(run.compute_ref_log_probs(run.model, batch))


def own(run: trl.DPOTrainer, model: nn.Module) -> torch.Tensor:
    """Log-probabilities of a model for the same batch, by hand."""
    batch = next(iter(run.get_train_dataloader()))
    with torch.no_grad():
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logps = logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    return (logps * batch["completion_mask"][:, 1:]).sum(1)


def first_loss(run: trl.DPOTrainer) -> float:
    run.train()
    return next(row["loss"] for row in run.state.log_history if "loss" in row)


@pytest.mark.parametrize("given", ["config", "fresh adapter"])
def test_the_reference_of_a_new_adapter_is_the_base(tmp_path, make, tiny_tokenizer, given):
    if given == "config":
        run = dpo(make(), tiny_tokenizer, tmp_path, peft_config=milora())
    else:
        run = dpo(peft.get_peft_model(make(), milora()), tiny_tokenizer, tmp_path)
    torch.testing.assert_close(references(run), own(run, make()), atol=1e-4, rtol=1e-5)
    assert first_loss(run) == pytest.approx(math.log(2), abs=1e-6)
    torch.testing.assert_close(references(run), own(run, make()), atol=1e-4, rtol=1e-5)


@pytest.fixture
def checkpoint(tmp_path: Path, make) -> Path:
    """A trained adapter, saved."""
    model = peft.get_peft_model(make(), milora(part="principal"))
    trainer(model, tmp_path / "before", save_strategy="no").train()
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_the_reference_of_a_loaded_adapter_is_that_adapter(tmp_path, make, tiny_tokenizer, checkpoint):
    run = dpo(tiny.resume(make(), checkpoint), tiny_tokenizer, tmp_path / "run", steps=3)
    assert set(run.model.peft_config) == {"default", "ref"}
    loaded = tiny.resume(make(), checkpoint)
    expected = own(run, loaded)
    assert (expected - own(run, make())).abs().max() > 1e-2
    torch.testing.assert_close(references(run), expected, atol=1e-4, rtol=1e-5)
    assert first_loss(run) == pytest.approx(math.log(2), abs=1e-6)
    torch.testing.assert_close(references(run), expected, atol=1e-4, rtol=1e-5)
    assert (own(run, run.model) - expected).abs().max() > 1e-3


def test_preference_training_with_a_reference_resumes_to_the_bit(tmp_path, make, tiny_tokenizer, checkpoint):
    whole = dpo(tiny.resume(make(), checkpoint), tiny_tokenizer, tmp_path / "whole", steps=4)
    whole.train()
    dpo(tiny.resume(make(), checkpoint), tiny_tokenizer, tmp_path / "halves", steps=2).train()
    halves = dpo(tiny.resume(make(), checkpoint), tiny_tokenizer, tmp_path / "halves", steps=4)
    halves.train(resume_from_checkpoint=str(tmp_path / "halves" / "checkpoint-2"))
    assert any(".ref." in name for name in state(halves.model))
    tiny.assert_same_adapter(whole.model, halves.model)


REFERENCES = {
    "milora": milora(),
    "milora with dora": milora(use_dora=True),
    "milora on an embedding": milora(target_modules=["q_proj", "embed_tokens"]),
    "sora": rw.SoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "sora of a part": rw.SoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM", part="minor"),
    "sora on an embedding": rw.SoraConfig(r=4, target_modules=["embed_tokens"], task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_the_reference_is_the_loaded_adapter_of_every_kind(tmp_path, make, tiny_tokenizer, name):
    """TRL copies parameters of which the adapter's name stands between dots: no gates, and none of an embedding."""
    config = copy.deepcopy(REFERENCES[name])
    model = peft.get_peft_model(make(), config)
    trainer(model, tmp_path / "before", steps=2, save_strategy="no").train()
    model.save_pretrained(tmp_path / "checkpoint")

    def load() -> peft.PeftModel:
        if isinstance(config, rw.MiloraConfig):
            return tiny.resume(make(), tmp_path / "checkpoint")
        return peft.PeftModel.from_pretrained(make(), tmp_path / "checkpoint", is_trainable=True)

    run = dpo(load(), tiny_tokenizer, tmp_path / "run", steps=1)
    expected = own(run, load())
    assert (expected - own(run, make())).abs().max() > 1e-2
    torch.testing.assert_close(references(run), expected, atol=1e-4, rtol=1e-5)
    assert first_loss(run) == pytest.approx(math.log(2), abs=1e-6)
    torch.testing.assert_close(references(run), expected, atol=1e-4, rtol=1e-5)
