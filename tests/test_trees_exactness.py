"""Log-probabilities and gradients of trees against those of separate sequences."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers.integrations.flex_attention as flex
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from transformers import MixtralConfig, MixtralForCausalLM

from rankwise.likelihood import answer_log_probabilities
from rankwise.tokenise import AnswerCollator
from rankwise.trees import answer_log_probabilities_of, batch_trees, token_tree, tree_log_probabilities
from tiny_trees import FAMILIES, ROWS, SMALL, Row, assert_same, gradients, make, rows_of, separate

SDPA = [family for family in FAMILIES if family != "gemma2"]  # which has eager attention only
TREES = [token_tree(*row) for row in ROWS]


def tree_totals(model: nn.Module, rows: list[Row], tokens_per_row: int | None = None) -> list[Tensor]:
    batch = batch_trees([token_tree(*row) for row in rows], 0, tokens_per_row)
    totals = tree_log_probabilities(model, batch)
    assert (totals[~batch.exists] == 0).all()
    return [totals[number, : len(answers)] for number, (_, answers) in enumerate(rows)]


def assert_exact(model: nn.Module, tolerance: float, rows: list[Row] = ROWS, tokens_per_row: int | None = None) -> None:
    """Log-probabilities and, of a weighted sum of them, all gradients."""
    expected, found = separate(model, rows), tree_totals(model, rows, tokens_per_row)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other, tolerance, float(other.detach().abs().max()))
    expected_gradients, found_gradients = gradients(model, expected), gradients(model, found)
    assert found_gradients.keys() == expected_gradients.keys()
    largest = max(float(value.abs().max()) for value in expected_gradients.values())
    assert largest > 0.1
    for name, value in expected_gradients.items():
        assert_same(found_gradients[name], value, tolerance, largest)


@pytest.mark.parametrize(("family", "attention"), [*((family, "sdpa") for family in SDPA), ("gemma2", "eager")])
def test_trees_equal_separate_sequences_in_float64(
    family: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Eager attention takes its softmax in float32, whatever the model's dtype: here it does not.
    monkeypatch.setattr(nn.functional, "softmax", lambda scores, dim, dtype=None: scores.softmax(dim))
    assert_exact(make(family, torch.float64, attention), 1e-10, tokens_per_row=48)


@pytest.mark.parametrize("family", SDPA)
def test_trees_equal_separate_sequences_in_float32(family: str) -> None:
    assert_exact(make(family), 1e-5, ROWS[:1])


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_attention_in_float32(family: str) -> None:
    assert_exact(make(family, attention="eager"), 1e-5, ROWS[:1])


@given(st.lists(rows_of(tokens=3), min_size=1, max_size=3), st.sampled_from([None, 32]))
@settings(deadline=None, max_examples=20)
def test_random_trees_equal_separate_sequences(rows: list[Row], tokens_per_row: int | None) -> None:
    assert_exact(make("llama", torch.float64, num_hidden_layers=1), 1e-10, rows, tokens_per_row)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_rows_may_be_wider_than_the_longest_sequence_that_the_model_takes(family: str) -> None:
    model, rows = make(family, torch.float64), ROWS * 4
    assert batch_trees([token_tree(*row) for row in rows], 0, 96).input_ids.shape == (1, 80)
    with torch.no_grad():
        expected, found = torch.cat(separate(model, rows)), torch.cat(tree_totals(model, rows, 96))
    assert_same(found, expected, 1e-10, 1.0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_trees_equal_sequences_padded_on_the_left(family: str) -> None:
    model = make(family, torch.float64)
    rows = [(prompt, answer) for prompt, answers in ROWS for answer in answers]
    batch = AnswerCollator(pad_id=0)(
        [{"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer} for prompt, answer in rows]
    )
    assert (batch["attention_mask"] == 0).any()
    values, mask = answer_log_probabilities(model, batch)
    assert mask.sum(dim=1).tolist() == [len(answer) for _, answer in rows]
    assert_same(torch.cat(tree_totals(model, ROWS)), values.sum(dim=1), 1e-10, 10.0)


@pytest.mark.parametrize(
    "places",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "v_proj"], "use_dora": True},
    ],
    ids=["lora", "head", "saved head", "dora"],
)
def test_adapted_models(places: dict[str, object]) -> None:
    torch.manual_seed(2)
    config = LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, **places)
    assert_exact(get_peft_model(make("llama", torch.float64), config).double(), 1e-10)


def test_tied_heads() -> None:
    assert_exact(make("llama", torch.float64, tie_word_embeddings=True), 1e-10)


def test_experts_are_chosen_for_each_token_alone() -> None:
    torch.manual_seed(0)
    assert_exact(MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4)).eval(), 2e-5)


def test_gradient_checkpointing_changes_nothing() -> None:
    model = make("llama", torch.float64).train()
    expected = gradients(model, tree_totals(model, ROWS))
    model.gradient_checkpointing_enable()
    found = gradients(model, tree_totals(model, ROWS))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_same(found[name], value, 1e-12, 1.0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_flex_attention_gives_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward only, and not compiled: FlexAttention has no gradients on a CPU."""
    monkeypatch.setattr(flex, "WrappedFlexAttention", lambda training: lambda: flex_attention)
    model, other = make(family, attention="eager"), make(family, attention="flex_attention")
    with torch.no_grad():
        expected, found = (torch.cat(tree_totals(one, ROWS, tokens_per_row=40)) for one in (model, other))
    assert_same(found, expected, 1e-5, 1.0)


def test_half_precision_stays_close() -> None:
    exact = torch.cat(tree_totals(make("llama"), ROWS)).detach()
    found = torch.cat(tree_totals(make("llama", torch.bfloat16), ROWS))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = torch.cat(tree_totals(make("llama"), ROWS))
    for values in (found, mixed):
        assert values.dtype == torch.float32
        torch.testing.assert_close(values.detach(), exact, atol=0.3, rtol=0.05)


class Wrapper(nn.Module):
    """As distributed training wraps a model; keeps how wide the logits of each call were."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.seen = module, []

    def forward(self, **inputs):
        output = self.module(**inputs)
        self.seen.append((tuple(inputs["input_ids"].shape), tuple(output.logits.shape)))
        return output


def test_the_head_runs_only_where_it_is_read() -> None:
    """Nodes that predict: of the first row the prompt's end, 7, 7 8, 7 8 4, 12 and 12 7; 3 and 5 of the others."""
    model = make("llama", torch.float64)
    wrapped, heads = Wrapper(model), []
    model.lm_head.register_forward_hook(lambda _, inputs, output: heads.append(inputs[0].shape))
    found = tree_totals(wrapped, ROWS)
    assert heads == [(1, 14, 16)]
    assert [logits for _, logits in wrapped.seen] == [(1, 14, 48)]
    assert_same(torch.cat(found), torch.cat(separate(model, ROWS)), 1e-10, 1.0)


def test_the_head_is_as_before_afterwards_and_after_a_failure() -> None:
    model, batch = make("llama"), batch_trees(TREES, padding=0)
    expected = model(input_ids=batch.input_ids).logits
    tree_log_probabilities(model, batch)
    torch.testing.assert_close(model(input_ids=batch.input_ids).logits, expected, rtol=0, atol=0)
    broken = copy.deepcopy(model)
    broken.model.layers[1].forward = None
    with pytest.raises(TypeError):
        tree_log_probabilities(broken, batch)
    assert not broken.lm_head._forward_pre_hooks


def test_many_trees_in_batches() -> None:
    rows = [(prompt * times, answers) for times in range(1, 8) for prompt, answers in ROWS]
    model = Wrapper(make("llama", torch.float64))
    found = answer_log_probabilities_of(model, [token_tree(*row) for row in rows], padding=0, batch_tokens=64)
    sizes = [shape[0] * shape[1] for shape, _ in model.seen]
    assert max(sizes) <= 64 and len(sizes) > 3
    with torch.no_grad():
        expected = separate(model.module, rows)
    for values, other in zip(found, expected, strict=True):
        assert values == pytest.approx(other.tolist(), rel=1e-10)


def test_a_tree_larger_than_a_batch_has_one_for_itself() -> None:
    model = Wrapper(make("llama"))
    found = answer_log_probabilities_of(model, TREES, padding=0, batch_tokens=1)
    assert [len(values) for values in found] == [6, 3, 2]
    assert [shape[0] for shape, _ in model.seen] == [1, 1, 1]
