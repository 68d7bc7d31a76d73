"""Constrained generation names answers of the catalogue, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.errors import UserError
from rankwise.trees.catalogue import score_catalogue
from rankwise.trees.constraint import CatalogueConstraint
from rankwise.trees.trie import CatalogueTrie
from tiny_trees import make

END = 2
MODEL = make("llama")
PROMPTS = [[0, 0, 7], [9, 4, 11], [0, 12, 12]]
STRATEGIES: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": True, "temperature": 3.0},
    {"do_sample": False, "num_beams": 3},
    {"do_sample": True, "top_p": 0.5, "repetition_penalty": 5.0},
]


def written(trie: CatalogueTrie, prompts: list[list[int]], **strategy: Any) -> list[list[int]]:
    ids = torch.tensor(prompts)
    constraint = CatalogueConstraint(trie, start=ids.shape[1], end=END)
    torch.manual_seed(0)
    made = MODEL.generate(
        input_ids=ids,
        attention_mask=(ids != 0).long(),
        logits_processor=[constraint],
        max_new_tokens=trie.longest + 1,
        pad_token_id=0,
        eos_token_id=END,
        **strategy,
    )
    return [up_to_its_end(row) for row in made[:, ids.shape[1] :].tolist()]


def up_to_its_end(row: list[int]) -> list[int]:
    """What follows the first end is filling: zeros, or with beams ends."""
    whole = [token for token in row if token]
    return whole[: whole.index(END) + 1] if END in whole else whole


ids = st.lists(st.integers(3, 9), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(answers=st.lists(ids, min_size=1, max_size=12), closed=st.booleans(), strategy=st.sampled_from(STRATEGIES))
def test_whatever_is_written_is_in_the_catalogue(
    answers: list[list[int]], closed: bool, strategy: dict[str, Any]
) -> None:
    """Answers that are beginnings of others too, with and without the token that ends them."""
    catalogue = [[*answer, END] if closed else answer for answer in answers]
    known = {(*answer, END) for answer in answers}
    for row in written(CatalogueTrie(catalogue), PROMPTS, **strategy):
        assert (*row, END) in known or tuple(row) in known


def test_the_best_of_as_many_beams_as_answers_is_the_best_of_the_ranking() -> None:
    answers = [[3, 4, END], [3, 5, 6, END], [8, END], [4, 4, 4, END], [9, 3, END]]
    trie = CatalogueTrie(answers)
    found = written(trie, PROMPTS, num_beams=5, do_sample=False, length_penalty=0.0, early_stopping=False)
    best = score_catalogue(MODEL, [[token for token in prompt if token] for prompt in PROMPTS], trie, 0).argmax(dim=1)
    assert found == [answers[place] for place in best]


def test_what_may_follow() -> None:
    constraint = CatalogueConstraint(CatalogueTrie([[3, 4], [3, 4, 5], [6, END]]), start=0, end=END)
    assert constraint.allowed([]) == [3, 6]
    assert constraint.allowed([3]) == [4]
    assert constraint.allowed([3, 4]) == [5, END]
    assert constraint.allowed([3, 4, END]) == [END]
    assert constraint.allowed([3, 4, END, 0, 0]) == [END]  # filling
    assert constraint.allowed([3, 4, 5]) == [END]
    assert constraint.allowed([6]) == [END]
    assert constraint.allowed([6, END, 0]) == [END]


def test_mistakes_are_named() -> None:
    trie = CatalogueTrie([[3, 4]])
    with pytest.raises(UserError, match="start is -1: give the tokens of a row before its answer"):
        CatalogueConstraint(trie, start=-1, end=END)
    constraint = CatalogueConstraint(trie, start=1, end=END)
    with pytest.raises(UserError, match=r"has 7 as token 2 of its answer.*start \(1\) has to be"):
        constraint(torch.tensor([[5, 3, 7]]), torch.zeros(1, 48))
