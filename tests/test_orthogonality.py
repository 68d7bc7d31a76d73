from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import rankwise as rw
import tiny
import tiny_adalora
from rankwise.errors import UserError
from rankwise.ranks import orthogonality
from rankwise.ranks.adalora.orthogonality import orthogonality_loss
from rankwise.tasks.labels import LabelTrainer
from rankwise.tokenise import AnswerCollator, encode_answers
from rankwise.training import AnswerTrainer
from tiny_adalora import adapt

PAIRS = [{"prompt": f"Question {n}: what is it?", "completion": " It is a fox." * (1 + n % 3)} for n in range(6)]
PREFERENCES = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": [" No.", " A dog."]} for row in PAIRS]


@pytest.mark.parametrize("family", list(tiny.TARGETS))
def test_the_term_is_the_mean_distance_from_orthonormal(family):
    """Against numpy, in float64."""
    model = tiny.train(adapt(family), 3)
    distances = []
    for layer in tiny.layers(model).values():
        for factor in (layer.lora_A["default"], layer.lora_B["default"].T):
            f = factor.detach().double().numpy()
            distances.append(np.linalg.norm(f @ f.T - np.eye(4)))
    assert float(orthogonality(model)) == pytest.approx(np.mean(distances), rel=1e-6)


@pytest.mark.parametrize("family", list(tiny.TARGETS))
def test_the_term_is_what_peft_adds_to_the_models_own_loss(family):
    model = tiny.train(adapt(family, orth_reg_weight=0.3), 3)
    whole = tiny.loss(model)
    whole.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.peft_config["default"].orth_reg_weight = 0.0
    bare = tiny.loss(model)
    model.peft_config["default"].orth_reg_weight = 0.3
    ours = bare + orthogonality_loss(model.train())
    torch.testing.assert_close(ours, whole, atol=1e-6, rtol=1e-6)
    ours.backward()
    for name, p in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(p.grad, gradients[name], atol=1e-6, rtol=1e-5)


def test_autocast_does_not_round_it():
    model = tiny.train(adapt(), 3)
    expected = orthogonality(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(orthogonality(model), expected)


def test_where_there_is_no_term():
    assert orthogonality_loss(tiny.make("llama").train()) == 0.0
    assert orthogonality_loss(tiny.adapted("llama").train()) == 0.0
    assert orthogonality_loss(adapt(orth_reg_weight=0.0).train()) == 0.0
    assert orthogonality_loss(adapt().eval()) == 0.0
    with pytest.raises(UserError, match="is of LoraConfig"):
        orthogonality(tiny.adapted("llama"))


class Gradients(TrainerCallback):
    """Keeps the gradients of each optimizer step, and the term's own at that step."""

    def __init__(self) -> None:
        self.found: list[dict[str, torch.Tensor]] = []
        self.expected: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        factors = {name: p for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name}
        self.found.append({name: p.grad.clone() for name, p in factors.items()})
        term = torch.autograd.grad(orthogonality(model), list(factors.values()))
        self.expected.append(dict(zip(factors, term, strict=True)))


def settings(folder: Path, accumulation: int) -> dict[str, Any]:
    """A learning rate of zero: two trainings then see the same weights."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": 1.0,
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
        "seed": 2,
    }


def answers(model, tokenizer, folder, accumulation, callback) -> Trainer:
    return AnswerTrainer(
        model=model,
        args=TrainingArguments(**settings(folder, accumulation)),
        train_dataset=encode_answers(PAIRS, tokenizer, 64)[0],
        data_collator=AnswerCollator.of(tokenizer),
        callbacks=[callback],
    )


def preferences(model, tokenizer, folder, accumulation, callback) -> Trainer:
    arguments = rw.SoftmaxDPOConfig(**settings(folder, accumulation))
    return rw.SoftmaxDPOTrainer(model, arguments, PREFERENCES, processing_class=tokenizer, callbacks=[callback])


def labels(model, tokenizer, folder, accumulation, callback) -> Trainer:
    rows = [{"input_ids": row["input_ids"], "labels": n % 3} for n, row in enumerate(tiny_adalora.rows(6))]
    arguments = TrainingArguments(**settings(folder, accumulation))
    return LabelTrainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback])


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("make", [answers, preferences, labels])
def test_each_step_of_our_trainers_has_the_term_once(
    tmp_path, tiny_tokenizer, tiny_llama: LlamaForCausalLM, make: Callable[..., Trainer], accumulation: int
):
    """Gradients with a weight of 0.5, less those with none, are half the term's, whatever was accumulated.

    Three batches: with an accumulation of 2, the second step has one batch only.
    """
    kept = {}
    for weight in (0.0, 0.5):
        if make is labels:
            model = adapt("bert", orth_reg_weight=weight)
        else:
            model = adapt(base=copy.deepcopy(tiny_llama), orth_reg_weight=weight)
        for layer in tiny.layers(model).values():
            torch.nn.init.ones_(layer.lora_E["default"])
        kept[weight] = Gradients()
        made = make(model, tiny_tokenizer, tmp_path / str(weight), accumulation, kept[weight])
        made.train()
    assert len(kept[0.5].found) == {1: 3, 2: 2, 3: 1}[accumulation]
    for bare, whole, term in zip(kept[0.0].found, kept[0.5].found, kept[0.5].expected, strict=True):
        for name, gradient in term.items():
            torch.testing.assert_close(whole[name] - bare[name], 0.5 * gradient, atol=1e-5, rtol=1e-4)
            assert gradient.abs().max() > 1e-3


def test_the_trainer_of_transformers_adds_pefts_term_for_each_accumulated_batch(tmp_path):
    """A fact that the docs state: a language model's loss is divided by all tokens, and the term is not."""
    kept = {}
    for weight in (0.0, 0.5):
        model, kept[weight] = adapt(orth_reg_weight=weight), Gradients()
        tiny_adalora.trainer(
            model,
            tmp_path,
            kept[weight],
            learning_rate=0.0,
            max_grad_norm=0.0,
            max_steps=1,
            gradient_accumulation_steps=3,
        ).train()
    for name, term in kept[0.5].expected[0].items():
        difference = kept[0.5].found[0][name] - kept[0.0].found[0][name]
        torch.testing.assert_close(difference, 3 * 0.5 * term, atol=1e-5, rtol=1e-4)


def test_an_evaluation_has_no_term(tmp_path, tiny_tokenizer, tiny_llama):
    losses = []
    for weight in (0.0, 5.0):
        model = adapt(base=copy.deepcopy(tiny_llama), orth_reg_weight=weight)
        made = answers(model, tiny_tokenizer, tmp_path, 1, Gradients())
        losses.append(made.evaluate(made.train_dataset)["eval_loss"])
    assert losses[0] == losses[1]
