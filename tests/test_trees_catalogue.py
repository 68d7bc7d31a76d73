from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from rankwise.errors import UserError
from rankwise.trees import catalogue
from rankwise.trees.catalogue import catalogue_scores, score_catalogue, separate_log_probabilities
from rankwise.trees.trie import CatalogueTrie, Chunk
from tiny_trees import FAMILIES, make

PROMPTS = [[7], [3, 9, 4, 11, 30], [12, 12], [5, 6, 7, 8, 9, 10, 11, 12, 13], [40, 2]]
CHUNKS = [3, 16, 1000]


def some_answers(seed: int = 0, count: int = 18) -> list[list[int]]:
    """Few different tokens, so that many are shared; beginnings of one another, equal ones, and ones of one token."""
    generator = random.Random(seed)
    drawn = [[generator.randrange(3, 7) for _ in range(generator.randint(1, 6))] for _ in range(count)]
    return [*drawn, drawn[4], drawn[9], [45], [3, 3, 3, 3, 3, 3, 3, 3], [3, 3, 3, 3]]


ANSWERS = some_answers()
MODEL = make("llama", torch.float64)


@torch.no_grad()
def alone(model: nn.Module, prompt: list[int], answer: list[int]) -> float:
    """A sequence by itself, without padding, mask or cache, and numpy's float64."""
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double().numpy()
    logs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return sum(logs[len(prompt) - 1 + place, token] for place, token in enumerate(answer))


def reference(model: nn.Module, prompts: list[list[int]] = PROMPTS, answers: list[list[int]] = ANSWERS) -> np.ndarray:
    return np.array([[alone(model, prompt, answer) for answer in answers] for prompt in prompts])


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gemma2"])  # that has eager attention alone
def test_scores_are_those_of_separate_sequences_whatever_the_chunks(name: str) -> None:
    model, trie = make(name, torch.float64), CatalogueTrie(ANSWERS)
    expected = reference(model)
    assert np.std(expected) > 1
    for chunk in CHUNKS:
        found = score_catalogue(model, PROMPTS, trie, 0, chunk=chunk)
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["mistral", "gemma3_text"])
def test_a_model_that_takes_no_trees_is_read_sequence_by_sequence_with_a_warning(name: str) -> None:
    model = make(name, torch.float64, sliding_window=4)
    with pytest.warns(UserWarning, match="every answer of the catalogue is read with a prompt of its own: its sliding"):
        found = score_catalogue(model, PROMPTS[1:4], CatalogueTrie(ANSWERS), 0, batch_tokens=60)
    np.testing.assert_allclose(found.numpy(), reference(model, PROMPTS[1:4]), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "attention"),
    [("llama", "eager"), ("llama", "flex_attention"), ("gemma2", "eager"), ("gemma3_text", "eager")],
)
def test_other_attention_is_exact_and_stays_what_it_is(name: str, attention: str) -> None:
    """In single precision, in which eager attention has its weights."""
    model = make(name, attention="eager")
    expected = reference(model)
    model.set_attn_implementation(attention)
    found = score_catalogue(model, PROMPTS, CatalogueTrie(ANSWERS), 0, chunk=7)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-4)
    assert model.config._attn_implementation == attention


class Wrapper(nn.Module):
    """A wrapper as of distributed training, that keeps rows and width of what goes in, and what the cache holds."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.passes = module, []

    def forward(self, **inputs):
        self.passes.append((*inputs["input_ids"].shape, inputs["past_key_values"].get_seq_length()))
        return self.module(**inputs)


def test_an_adapted_model_in_a_wrapper_reads_the_prompts_once_and_each_chunk_once() -> None:
    model = make("llama", torch.float64)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    wrapped = Wrapper(adapted.eval().double())
    trie = CatalogueTrie(ANSWERS)
    found = score_catalogue(wrapped, PROMPTS, trie, 0, chunk=16)
    np.testing.assert_allclose(found.numpy(), reference(adapted), rtol=0, atol=1e-10)
    prompts, *chunks = wrapped.passes
    assert prompts == (5, 9, 0)
    assert {(rows, before) for rows, _, before in chunks} == {(5, 9)}
    assert trie.nodes <= sum(width for _, width, _ in chunks) <= trie.nodes + len(chunks) * trie.longest
    assert not found.requires_grad


@pytest.mark.parametrize(("batch_tokens", "logits"), [(40, 10**6), (10**6, 20), (1, 1)])
def test_batches_and_chunks_are_bounded_by_tokens_and_by_logits(
    batch_tokens: int, logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "tokens_for_logits", lambda model, wanted: min(wanted, logits))
    model, trie = Wrapper(make("llama", torch.float64)), CatalogueTrie(ANSWERS)
    found = score_catalogue(model, PROMPTS, trie, 0, batch_tokens=batch_tokens, chunk=12)
    np.testing.assert_allclose(found.numpy(), reference(model.module), rtol=0, atol=1e-10)
    chunks = [(rows, width, before) for rows, width, before in model.passes if before]
    assert max(rows * width for rows, width, _ in chunks) <= max(logits, trie.longest)
    assert max(rows * (width + before) for rows, width, before in chunks) <= max(batch_tokens, 9 + trie.longest)


def test_prompts_come_a_batch_at_a_time_longest_first() -> None:
    trie = CatalogueTrie([[3, 4], [3, 5]])
    assert [rows for rows, _ in catalogue_scores(MODEL, PROMPTS, trie, 0, batch_tokens=12)] == [[3], [1, 2], [4, 0]]


def test_half_precision_is_summed_in_single() -> None:
    model = make("llama", torch.bfloat16)
    found = score_catalogue(model, PROMPTS, CatalogueTrie(ANSWERS), 0, chunk=5)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), reference(model), rtol=0.05, atol=0.5)


def test_equal_answers_have_the_very_same_score() -> None:
    found = score_catalogue(make("llama"), PROMPTS, CatalogueTrie(ANSWERS), 0)
    assert torch.equal(found[:, 4], found[:, 18])
    assert torch.equal(found[:, 9], found[:, 19])


ids = st.lists(st.integers(3, 5), min_size=1, max_size=5)


@settings(max_examples=20, deadline=None)
@given(
    answers=st.lists(ids, min_size=1, max_size=8),
    prompts=st.lists(ids, min_size=1, max_size=3),
    chunk=st.integers(1, 12),
    batch_tokens=st.integers(1, 100),
)
def test_any_answers_in_any_chunks_and_batches(
    answers: list[list[int]], prompts: list[list[int]], chunk: int, batch_tokens: int
) -> None:
    found = score_catalogue(MODEL, prompts, CatalogueTrie(answers), 0, batch_tokens, chunk)
    np.testing.assert_allclose(found.numpy(), reference(MODEL, prompts, answers), rtol=0, atol=1e-10)


@settings(max_examples=50, deadline=None)
@given(answers=st.lists(ids, min_size=1, max_size=20), most=st.integers(1, 12))
def test_chunks_hold_each_beginning_once_and_are_no_larger_than_they_may(answers: list[list[int]], most: int) -> None:
    trie = CatalogueTrie(answers)
    beginnings = {tuple(answer[:end]) for answer in answers for end in range(1, len(answer))}
    edges = {tuple(answer[:end]) for answer in answers for end in range(1, len(answer) + 1)}
    assert (trie.nodes, trie.edges, len(trie), trie.longest) == (
        len(beginnings),
        len(edges),
        len(answers),
        max(map(len, answers)),
    )
    chunks, reached = list(trie.chunks(most)), len(trie.first)
    assert trie.first.tolist() == sorted({answer[0] for answer in answers})
    for chunk in chunks:
        assert len(chunk.tokens) <= max(most, int(chunk.depths.max()))
        assert chunk.place.start == reached
        reached = chunk.place.stop
        read = {
            (*path_to(chunk, source), target)
            for source, target in zip(chunk.sources.tolist(), chunk.targets.tolist(), strict=True)
        }
        assert read <= edges and len(read) == chunk.place.stop - chunk.place.start
        edges -= read
    assert reached == trie.edges
    assert edges == {(answer[0],) for answer in answers}


def path_to(chunk: Chunk, node: int) -> tuple[int, ...]:
    """Tokens of what a node sees, itself included."""
    return tuple(chunk.tokens[k].item() for k in range(node + 1) if node < chunk.ends[k])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_separate_sequences_keep_their_order_in_batches_of_one_length(name: str) -> None:
    model = make(name, torch.float64)
    for batch_tokens in (1, 30, 10_000):
        found = separate_log_probabilities(model, PROMPTS[1], ANSWERS, batch_tokens)
        np.testing.assert_allclose(found.numpy(), reference(model, PROMPTS[1:2])[0], rtol=0, atol=1e-10)


def test_what_is_empty_is_refused() -> None:
    trie = CatalogueTrie(ANSWERS)
    with pytest.raises(UserError, match="after prompts of at least one token each, and prompt 2 is empty"):
        score_catalogue(MODEL, [[3], []], trie, 0)
    with pytest.raises(UserError, match="after prompts of at least one token each, and there is none"):
        score_catalogue(MODEL, [], trie, 0)
    with pytest.raises(UserError, match="answers of at least one token each, and answer 1 is empty"):
        CatalogueTrie([[3], []])
    with pytest.raises(UserError, match="answers of at least one token each, and there is none"):
        CatalogueTrie([])
