from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

import tiny_families
from rankwise.errors import UserError
from rankwise.preferences.drawing import MINED_FILE, Negatives
from rankwise.preferences.mining import answer_trie, mine_hard
from rankwise.preferences.negatives import Catalogue
from rankwise.preferences.rows import PreferenceRow
from rankwise.tokenise import encode_completion
from rankwise.trees.trie import CatalogueTrie

PROMPTS = [[7], [3, 9, 4, 11, 30], [5, 6, 7, 8]]
GENERATOR = random.Random(0)
DRAWN = {tuple(GENERATOR.randrange(3, 12) for _ in range(GENERATOR.randint(1, 5))): None for _ in range(40)}
ANSWERS = [list(answer) for answer in DRAWN][:25]
EXCLUDED = [{0, 3, 4}, set(), {24, 11, 2, 7}]
POOLS = [[5, 3, 9, 20, 9, 1], [0, 1, 2, 3, 4, 5, 6, 7], [24, 11, 8]]
MODEL = tiny_families.make("llama", torch.float64)


@torch.no_grad()
def score(model: nn.Module, prompt: list[int], answer: list[int]) -> float:
    """A sequence by itself, and numpy."""
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double().numpy()
    logs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return sum(logs[len(prompt) - 1 + place, token] for place, token in enumerate(answer))


def ranked(model: nn.Module, prompt: list[int], indices: list[int]) -> list[int]:
    """Indices by falling score."""
    scores = {i: score(model, prompt, ANSWERS[i]) for i in indices}
    return sorted(scores, key=scores.__getitem__, reverse=True)


def test_the_whole_catalogue_is_ranked_without_what_is_excluded() -> None:
    found = mine_hard(MODEL, PROMPTS, CatalogueTrie(ANSWERS), EXCLUDED, 4, padding=0)
    for prompt, excluded, mined in zip(PROMPTS, EXCLUDED, found, strict=True):
        assert mined == ranked(MODEL, prompt, [index for index in range(25) if index not in excluded])[:4]


def test_a_pool_is_ranked_alone() -> None:
    found = mine_hard(MODEL, PROMPTS, CatalogueTrie(ANSWERS), EXCLUDED, 3, padding=0, pools=POOLS)
    for prompt, excluded, pool, mined in zip(PROMPTS, EXCLUDED, POOLS, found, strict=True):
        assert mined == ranked(MODEL, prompt, [index for index in pool if index not in excluded])[:3]
    assert list(map(len, found)) == [3, 3, 1]


def test_all_that_is_left_comes_where_more_is_wanted() -> None:
    found = mine_hard(MODEL, PROMPTS, CatalogueTrie(ANSWERS), EXCLUDED, 100, padding=0)
    assert list(map(len, found)) == [22, 25, 21]


def test_a_pool_may_be_drawn_from_the_texts() -> None:
    texts = Catalogue([f"answer {number}" for number in range(25)])
    pools = [texts.draw(random.Random(n), excluded, 10)[0] for n, excluded in enumerate(EXCLUDED)]
    found = mine_hard(MODEL, PROMPTS, CatalogueTrie(ANSWERS), EXCLUDED, 2, padding=0, pools=pools)
    assert [set(mined) <= set(pool) and len(mined) == 2 for mined, pool in zip(found, pools, strict=True)] == [True] * 3


@pytest.mark.parametrize("pools", [None, POOLS])
def test_a_model_that_takes_no_trees_is_mined_as_well(pools: list[list[int]] | None) -> None:
    torch.manual_seed(0)
    config = MistralConfig(**tiny_families.DECODER, sliding_window=3)
    model = MistralForCausalLM(config).double().eval()
    trie = CatalogueTrie(ANSWERS)
    if pools is None:
        with pytest.warns(UserWarning, match="with a prompt of its own: its sliding.window of 3"):
            found = mine_hard(model, PROMPTS, trie, EXCLUDED, 3, padding=0)
    else:
        found = mine_hard(model, PROMPTS, trie, EXCLUDED, 3, padding=0, pools=pools)
    for prompt, excluded, pool, mined in zip(PROMPTS, EXCLUDED, pools or [range(25)] * 3, found, strict=True):
        assert mined == ranked(model, prompt, [index for index in pool if index not in excluded])[:3]


@pytest.mark.parametrize("pools", [None, POOLS])
def test_the_model_evaluates_meanwhile_and_each_module_is_as_before(pools: list[list[int]] | None) -> None:
    model = tiny_families.make("gpt2", torch.float64)
    expected = mine_hard(model, PROMPTS, CatalogueTrie(ANSWERS), EXCLUDED, 3, padding=0, pools=pools)
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    assert {True, False} == set(modes)
    for _ in range(2):  # dropout of 0.1 would tell one from the other
        assert mine_hard(model, PROMPTS, CatalogueTrie(ANSWERS), EXCLUDED, 3, padding=0, pools=pools) == expected
        assert [module.training for module in model.modules()] == modes
    with pytest.raises(IndexError):
        mine_hard(model, [[99], *PROMPTS[1:]], CatalogueTrie(ANSWERS), EXCLUDED, 3, padding=0, pools=pools)
    assert [module.training for module in model.modules()] == modes
    assert all(value.grad is None for value in model.parameters())


def test_answers_are_tokenised_as_those_of_rows(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [" The river", " four", " The dog"]
    assert answer_trie(tiny_tokenizer, texts).answers == [encode_completion(tiny_tokenizer, text) for text in texts]


def test_mistakes_are_named() -> None:
    trie = CatalogueTrie(ANSWERS)
    with pytest.raises(UserError, match="mining 0 answers for a prompt is not possible: 1 or more"):
        mine_hard(MODEL, PROMPTS, trie, EXCLUDED, 0, padding=0)
    with pytest.raises(UserError, match="prompt 2 of 3 has no wrong answer left to mine: leave its row out"):
        mine_hard(MODEL, PROMPTS, trie, [{0}, {4, 5}, {1}], 1, padding=0, pools=[[3], [4, 5], [2]])
    with pytest.raises(UserError, match="prompt 3 of 3 has no wrong answer left"):
        mine_hard(MODEL, PROMPTS, trie, [{0}, {1}, set(range(25))], 1, padding=0)


def test_what_was_mined_is_for_as_many_processes(tmp_path: Path) -> None:
    """Others have other shares of the rows, and mine theirs anew."""
    negatives = object.__new__(Negatives)
    negatives._ids, negatives._mined = {"a": [1], "b": [2]}, {3: ["a"], 5: ["b"]}
    rows = [PreferenceRow(number=number, prompt=[], answers=[], texts=[]) for number in (3, 5)]
    negatives.keep_mined(tmp_path, 0, 2, [rows])
    assert negatives.take_mined(tmp_path, 0, 2) == 1 and negatives._mined == {3: ["a"], 5: ["b"]}
    assert negatives.take_mined(tmp_path, 0, 4) == 0
    assert negatives.take_mined(tmp_path, 1, 2) == 0


@pytest.mark.parametrize(
    "kept",
    [
        "[]",
        "{",
        "{}",
        '{"batches": 1}',
        '{"batches": 1, "answers": []}',
        '{"batches": 1, "answers": {"x": ["a"]}}',
        '{"batches": 1, "answers": {"3": 4}}',
        '{"batches": 1, "answers": {"3": ["c"]}}',
        '{"batches": "many", "answers": {"3": ["a"]}}',
        '{"batches": NaN, "answers": {"3": ["a"]}}',
    ],
)
def test_what_was_mined_and_is_damaged_is_told(tmp_path: Path, kept: str) -> None:
    negatives = object.__new__(Negatives)
    negatives._ids, negatives._mined = {"a": [1], "b": [2]}, {3: ["b"]}
    (tmp_path / MINED_FILE.format(0)).write_text(kept, encoding="utf-8")
    with pytest.raises(UserError, match=r"mined_answers_0\.json .*: resume from another checkpoint"):
        negatives.take_mined(tmp_path, 0, 2)
    assert negatives._mined == {3: ["b"]}
