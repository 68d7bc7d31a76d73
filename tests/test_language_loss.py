from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rankwise.errors import UserError
from rankwise.tasks.language_loss import answer_loss, token_batches
from rankwise.tasks.text import read_documents

Row = dict[str, list[int]]


def random_rows(number: int, seed: int = 0) -> list[Row]:
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(number):
        prompt, answer = generator.integers(1, 30), generator.integers(1, 12)
        ids = generator.integers(2, 300, prompt + answer).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * int(prompt) + ids[prompt:]})
    return rows


def reference(model: nn.Module, rows: list[Row]) -> tuple[float, int]:
    """Each row alone, all its logits, -log softmax in numpy's float64."""
    losses = []
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double().numpy()
        shifted = logits - logits.max(axis=1, keepdims=True)
        logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        places = [place for place in range(1, len(row["labels"])) if row["labels"][place] != -100]
        losses += [-logs[place - 1, row["labels"][place]] for place in places]
    return float(np.mean(losses)), len(losses)


class Fixed(nn.Module):
    """A model whose logits do not depend on the input: token 0 has three times the odds of token 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([math.log(3.0), 0.0]))
        self.config = LlamaConfig(vocab_size=2)
        self.asked: list[int] = []

    def forward(self, input_ids: torch.Tensor, logits_to_keep: int = 0, **kwargs: Any) -> SimpleNamespace:
        self.asked.append(logits_to_keep)
        logits = self.weight.expand(*input_ids.shape, 2)
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


def test_by_hand() -> None:
    """p(0) = 3/4 and p(1) = 1/4. Predicted are 0, 1 and 1: the loss is -(ln 3/4 + 2 ln 1/4) / 3.

    A label at the first position is not predicted: nothing stands before it.
    """
    rows = [{"input_ids": [1, 0, 1], "labels": [-100, 0, 1]}, {"input_ids": [0, 1], "labels": [0, 1]}]
    result = answer_loss(Fixed(), rows)
    expected = -(math.log(3 / 4) + 2 * math.log(1 / 4)) / 3
    assert result["loss"] == pytest.approx(expected, abs=1e-7)
    assert result["tokens"] == 3
    assert result["perplexity"] == pytest.approx(math.exp(expected), abs=1e-6)


def test_only_the_logits_of_answers_are_asked_for() -> None:
    """Ten tokens, of which the last two are the answer: they and the position that predicts the first."""
    model = Fixed()
    answer_loss(model, [{"input_ids": [0] * 10, "labels": [-100] * 8 + [0, 1]}])
    assert model.asked == [3]


@pytest.mark.parametrize("batch_tokens", [1, 64, 200, 8192])
def test_equals_row_by_row_whatever_the_batches(tiny_llama: LlamaForCausalLM, batch_tokens: int) -> None:
    rows = random_rows(40)
    loss, tokens = reference(tiny_llama, rows)
    result = answer_loss(tiny_llama, rows, batch_tokens)
    assert result["loss"] == pytest.approx(loss, abs=1e-5)
    assert result["tokens"] == tokens
    assert result["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


def test_order_of_rows_does_not_matter(tiny_llama: LlamaForCausalLM) -> None:
    rows = random_rows(20)
    assert answer_loss(tiny_llama, rows, 100)["loss"] == pytest.approx(
        answer_loss(tiny_llama, rows[::-1], 150)["loss"], abs=1e-6
    )


def test_loss_between_unlabelled_tokens(tiny_llama: LlamaForCausalLM) -> None:
    rows = random_rows(6, seed=1)
    for row in rows:
        row["labels"] = [token if place % 3 == 1 else -100 for place, token in enumerate(row["input_ids"])]
    rows = [row for row in rows if len(row["labels"]) > 1]
    assert answer_loss(tiny_llama, rows, 64)["loss"] == pytest.approx(reference(tiny_llama, rows)[0], abs=1e-5)


def test_absolute_positions_of_another_family() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    rows = random_rows(15)
    assert answer_loss(model, rows, 128)["loss"] == pytest.approx(reference(model, rows)[0], abs=1e-5)


def test_under_an_adapter_and_with_it_switched_off(tiny_llama: LlamaForCausalLM) -> None:
    rows = random_rows(10)
    plain = reference(tiny_llama, rows)[0]
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_llama, config).eval()
    adapted = answer_loss(model, rows, 128)["loss"]
    assert adapted == pytest.approx(reference(model, rows)[0], abs=1e-5)
    assert abs(adapted - plain) > 1e-3
    with model.disable_adapter():
        assert answer_loss(model, rows, 128)["loss"] == pytest.approx(plain, abs=1e-5)


class Whole(nn.Module):
    """A model that cannot leave logits out."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


def test_a_model_that_gives_all_logits(tiny_llama: LlamaForCausalLM) -> None:
    rows = random_rows(10)
    assert answer_loss(Whole(tiny_llama), rows, 128)["loss"] == pytest.approx(reference(tiny_llama, rows)[0], abs=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_measured_in_evaluation_mode_and_left_as_it_was(tiny_llama: LlamaForCausalLM, training: bool) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.9, init_lora_weights=False)
    model = peft.get_peft_model(tiny_llama, config)
    rows = random_rows(5)
    expected = answer_loss(model.eval(), rows)
    model.train(training).get_submodule("base_model.model.model.layers.0").eval()
    before = [module.training for module in model.modules()]
    assert answer_loss(model, rows) == expected
    assert [module.training for module in model.modules()] == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_half_precision_is_summed_in_float32(tiny_llama: LlamaForCausalLM) -> None:
    rows = random_rows(20)
    half = tiny_llama.to(torch.bfloat16)
    assert answer_loss(half, rows, 128)["loss"] == pytest.approx(reference(half, rows)[0], abs=2e-3)


def test_batches_keep_to_their_budget_and_hold_every_row() -> None:
    rows = random_rows(50, seed=2)
    batches = list(token_batches(rows, 90))
    assert sorted(map(str, rows)) == sorted(str(row) for batch in batches for row in batch)
    assert all(max(len(row["input_ids"]) for row in batch) * len(batch) <= 90 for batch in batches)
    assert len(list(token_batches(rows, 1))) == 50


@pytest.mark.parametrize(
    "rows", [[], [{"input_ids": [1], "labels": [1]}], [{"input_ids": [1, 2], "labels": [-100] * 2}]]
)
def test_nothing_to_predict(tiny_llama: LlamaForCausalLM, rows: list[Row]) -> None:
    with pytest.raises(UserError, match="no answer token"):
        answer_loss(tiny_llama, rows)


def test_real_model_on_real_stories(data_folder: Path) -> None:
    """The loss that its author reports for this model is 1.297 nats a token."""
    folder = str(data_folder / "stories260K" / "hf")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    stories = read_documents(data_folder / "text" / "tinystories.txt", separator="<|endoftext|>")[0][:60]
    ids = [tokenizer(story)["input_ids"][:512] for story in stories]
    rows = [{"input_ids": row, "labels": row} for row in ids]
    assert answer_loss(model.float(), rows, 4096)["loss"] == pytest.approx(1.297, abs=0.01)
