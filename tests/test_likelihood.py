from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rankwise import likelihood
from rankwise.likelihood import (
    answer_log_probabilities,
    forward_arguments,
    last_logits,
    last_logits_and_cache,
    position_ids,
    target_log_probabilities,
)
from rankwise.tokenise import AnswerCollator

ROWS = [
    {"input_ids": [1, 5, 9, 2, 30, 7], "labels": [-100, -100, -100, 2, 30, 7]},
    {"input_ids": [3, 8, 40], "labels": [-100, -100, 40]},
    {"input_ids": [4, 4, 17, 22, 6, 6, 31, 12, 1], "labels": [-100] * 7 + [12, 1]},
]
FAMILIES = ["llama", "gpt2", "opt", "qwen2"]


def make(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    common = {"vocab_size": 48, "initializer_range": 0.3, "pad_token_id": 0}
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
    narrow = {"intermediate_size": 24, "num_key_value_heads": 1}
    makers = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**common, **small, **narrow)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**common, **small, **narrow)),
        "opt": lambda: OPTForCausalLM(OPTConfig(**common, **small, ffn_dim=24, word_embed_proj_dim=16, init_std=0.3)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**common, n_embd=16, n_layer=2, n_head=2, n_positions=32)),
    }
    return makers[family]().eval()


@torch.no_grad()
def alone(model: nn.Module, row: dict[str, list[int]]) -> list[float]:
    """Log-probabilities of a row's answer tokens: the row by itself, without padding, and numpy's float64."""
    logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double().numpy()
    logs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    logs -= logits.max(-1, keepdims=True)
    return [logs[place - 1, label] for place, label in enumerate(row["labels"]) if place and label != -100]


def batch(rows: list[dict[str, list[int]]], more_padding: int = 0) -> dict[str, Tensor]:
    made = AnswerCollator(pad_id=0)(rows)
    fillings = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {name: nn.functional.pad(made[name], (more_padding, 0), value=value) for name, value in fillings.items()}


class Recording(nn.Module):
    """A wrapper as of distributed training, that keeps what goes in and how many logits come out."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        output = self.module(**inputs)
        self.inputs, self.logits = inputs, output.logits
        return output


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", [0, 4])
def test_answers_of_a_batch_equal_each_row_alone(family: str, padding: int) -> None:
    model = make(family)
    with torch.no_grad():
        values, mask = answer_log_probabilities(model, batch(ROWS, padding))
    assert values.dtype == torch.float32
    assert mask.sum(dim=1).tolist() == [3, 1, 2]
    assert (values[~mask] == 0).all()
    for row, found, own in zip(ROWS, values, mask, strict=True):
        np.testing.assert_allclose(found[own].numpy(), alone(model, row), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_rows_of_the_batch_change_nothing(family: str) -> None:
    model = make(family)
    with torch.no_grad():
        together = answer_log_probabilities(model, batch(ROWS))[0].sum(dim=1)
        apart = torch.stack([answer_log_probabilities(model, batch([row]))[0].sum() for row in ROWS])
        turned = answer_log_probabilities(model, batch(ROWS[::-1]))[0].sum(dim=1)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)
    torch.testing.assert_close(together, turned.flip(0), atol=1e-5, rtol=0)


def test_positions_count_from_the_first_own_token() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]


def test_only_the_logits_of_the_common_end_are_computed() -> None:
    """Of 9 tokens, the earliest answer token stands at position 6 and is predicted at 5: the last 4 positions."""
    model = Recording(make("llama"))
    values, _ = answer_log_probabilities(model, batch(ROWS))
    assert model.inputs["logits_to_keep"] == 4
    assert model.logits.shape == (3, 4, 48)
    assert values.shape == (3, 3)


def test_a_wrapped_model_and_an_adapted_one_are_looked_into() -> None:
    model = make("llama")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    for wrapped in (adapted, Recording(adapted)):
        assert {"position_ids", "logits_to_keep"} <= forward_arguments(wrapped)
        with torch.no_grad():
            values, mask = answer_log_probabilities(wrapped, batch(ROWS, 3))
        np.testing.assert_allclose(values[0][mask[0]].numpy(), alone(model, ROWS[0]), atol=1e-5)


class Plain(nn.Module):
    """A model that knows neither positions nor how many logits are wanted."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.inner = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = True):
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


def test_a_model_without_these_arguments_is_cut_afterwards() -> None:
    # Rotary positions are relative: a shift by the padding changes nothing.
    model = make("llama")
    with torch.no_grad():
        values, mask = answer_log_probabilities(Plain(model), batch(ROWS))
    np.testing.assert_allclose(values[mask].numpy(), np.concatenate([alone(model, row) for row in ROWS]), atol=1e-5)


def test_rows_without_an_answer_have_nothing_and_no_gradient() -> None:
    rows = [{"input_ids": [1, 2, 3], "labels": [-100] * 3}]
    values, mask = answer_log_probabilities(make("llama"), batch(rows))
    assert not mask.any()
    assert values.sum() == 0


def test_the_gradient_is_that_of_the_cross_entropy() -> None:
    model = make("llama")
    values, mask = answer_log_probabilities(model, batch(ROWS))
    (-values.sum() / mask.sum()).backward()
    found = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    total = sum(
        nn.functional.cross_entropy(
            model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1],
            torch.tensor(row["labels"][1:]),
            ignore_index=-100,
            reduction="sum",
        )
        for row in ROWS
    )
    (total / 6).backward()
    for name, value in model.named_parameters():
        torch.testing.assert_close(found[name], value.grad, atol=1e-5, rtol=1e-4)


def test_a_float64_model_is_scored_in_float64() -> None:
    model = make("gpt2").double()  # none of its layers rounds to float32
    with torch.no_grad():
        values, mask = answer_log_probabilities(model, batch(ROWS, 2))
    assert values.dtype == torch.float64
    expected = np.concatenate([alone(model, row) for row in ROWS])
    np.testing.assert_allclose(values[mask].numpy(), expected, rtol=1e-12)


def random_targets(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, the gradient of each target's value, and rows with none, one and several targets."""
    generator = torch.Generator().manual_seed(4)
    logits = (4 * torch.randn(11, 13, generator=generator)).to(dtype).requires_grad_()
    rows, targets = torch.tensor([3, 0, 3, 10, 3, 7]), torch.tensor([5, 5, 12, 0, 1, 8])
    return logits, torch.randn(len(rows), generator=generator), rows, targets


@pytest.mark.parametrize("at_a_time", [1, 30, 2**22])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_targets_equal_those_of_a_whole_log_softmax(
    dtype: torch.dtype, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of rows at a time; gradients are rounded once, to the logits' dtype."""
    monkeypatch.setattr(likelihood, "AT_A_TIME", at_a_time)
    logits, weights, rows, targets = random_targets(dtype)
    found = target_log_probabilities(logits, rows, targets)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    whole = logits.detach().double().requires_grad_()
    expected = whole.log_softmax(dim=1)[rows, targets]
    exact = dtype == torch.float64
    torch.testing.assert_close(found.double(), expected, rtol=1e-12 if exact else 1e-6, atol=1e-12 if exact else 1e-6)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert logits.grad.dtype == dtype
    rounding = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(logits.grad.double(), whole.grad, rtol=rounding, atol=1e-12 if exact else 1e-7)


def test_the_gradient_of_a_nearly_sure_target_is_not_lost_to_rounding() -> None:
    """softmax(0, -9) is 1 - 1.2e-4: in bfloat16 that is 1, but the gradient of its logarithm is no zero."""
    logits = torch.tensor([[0.0, -9.0]], dtype=torch.bfloat16, requires_grad=True)
    target_log_probabilities(logits, torch.tensor([0]), torch.tensor([0])).sum().backward()
    expected = torch.tensor([[1.0, -1.0]], dtype=torch.float64) / (1 + np.exp(9.0))
    torch.testing.assert_close(logits.grad.double(), expected, rtol=2**-8, atol=0)


def test_no_targets_have_no_gradient() -> None:
    logits = torch.randn(3, 5, requires_grad=True)
    none = torch.tensor([], dtype=torch.long)
    target_log_probabilities(logits, none, none).sum().backward()
    assert (logits.grad == 0).all()


def test_masked_tokens_of_the_vocabulary_stay_out() -> None:
    logits = torch.tensor([[1.0, -torch.inf, 2.0]], requires_grad=True)
    found = target_log_probabilities(logits, torch.tensor([0]), torch.tensor([2]))
    found.sum().backward()
    expected = np.log(1 / (1 + np.exp(-1.0)))
    assert found.item() == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(logits.grad.numpy(), [[-(1 - np.exp(expected)), 0, 1 - np.exp(expected)]], rtol=1e-5)


def test_bfloat16_autocast_stays_finite_and_close() -> None:
    model = make("llama")
    exact, mask = answer_log_probabilities(model, batch(ROWS))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values, _ = answer_log_probabilities(model, batch(ROWS))
    assert values.dtype == torch.float32
    assert torch.isfinite(values).all()
    torch.testing.assert_close(values[mask], exact[mask], atol=0.2, rtol=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_logits_and_the_cache(family: str) -> None:
    model, made = make(family), batch(ROWS)
    ids, mask = made["input_ids"], made["attention_mask"]
    with torch.no_grad():
        last, cache = last_logits_and_cache(model, ids, mask)
        several = last_logits(model, ids, mask, 3)
        expected = torch.stack([model(input_ids=torch.tensor([row["input_ids"]])).logits[0, -1] for row in ROWS])
    assert several.shape == (3, 3, 48)
    torch.testing.assert_close(several[:, -1], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last, expected, atol=1e-5, rtol=1e-5)
    assert cache.get_seq_length() == ids.shape[1]
