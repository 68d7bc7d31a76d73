"""The best answers found by search are those of the full ranking, whatever the model, the trie and the batch."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.errors import UserError
from rankwise.trees import frontier, search
from rankwise.trees.catalogue import score_catalogue
from rankwise.trees.frontier import TopAnswers
from rankwise.trees.search import top_answers
from rankwise.trees.trie import CatalogueTrie
from tiny_trees import FAMILIES, make

PROMPTS = [[7], [3, 9, 4, 11, 30], [12, 12], [5, 6, 7, 8, 9, 10, 11, 12, 13], [40, 2]]


def some_answers(count: int, seed: int = 0, tokens: int = 5, longest: int = 7) -> list[list[int]]:
    """Many are beginnings of others, and some are equal."""
    generator = random.Random(seed)
    lengths = [generator.randint(1, longest) for _ in range(count)]
    return [[generator.randrange(3, 3 + tokens) for _ in range(length)] for length in lengths]


ANSWERS = some_answers(120)
MODEL = make("llama", torch.float64)


def ranked(
    scores: torch.Tensor, trie: CatalogueTrie, count: int, barred: set[int], normalised: bool = False
) -> list[tuple[int, float]]:
    """By Python's sort over all scores."""
    values = (scores / trie.lengths if normalised else scores).tolist()
    order = sorted((index for index in range(len(trie)) if index not in barred), key=lambda index: -values[index])
    return [(index, values[index]) for index in order[:count]]


def assert_same(
    found: list[TopAnswers], expected: list[list[tuple[int, float]]], full: torch.Tensor, tolerance: float = 1e-10
) -> None:
    """The best scores; and places that have just these in the full ranking (which of equal ones does not matter)."""
    for one, best, scores in zip(found, expected, full.tolist(), strict=True):
        assert one.exact
        assert one.scores == pytest.approx([score for _, score in best], abs=tolerance)
        assert len(set(one.places)) == len(best)
        assert [scores[place] for place in one.places] == pytest.approx(one.scores, abs=tolerance)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gemma2"])  # that has eager attention alone
def test_the_best_are_those_of_the_full_ranking(name: str, normalised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "SHARE", 1.0)  # never the whole walk
    model, trie = make(name, torch.float64), CatalogueTrie(ANSWERS)
    barred = [set(range(at, 120, 7)) for at in range(len(PROMPTS))]
    full = score_catalogue(model, PROMPTS, trie, 0)
    expected = [ranked(row, trie, 6, some, normalised) for row, some in zip(full, barred, strict=True)]
    found = top_answers(model, PROMPTS, trie, 6, 0, excluded=barred, length_normalised=normalised)
    assert_same(found, expected, full / trie.lengths if normalised else full)
    assert normalised or all(one.read < trie.nodes for one in found)  # the bound of a mean is loose


def test_the_whole_walk_takes_over_where_a_search_would_read_too_much() -> None:
    trie = CatalogueTrie(ANSWERS)
    full = score_catalogue(MODEL, PROMPTS, trie, 0)
    found = top_answers(MODEL, PROMPTS, trie, 100, 0)
    assert_same(found, [ranked(row, trie, 100, set()) for row in full], full)
    assert all(one.read > trie.nodes for one in found)


@pytest.mark.parametrize("step", [1, 4, 1000])
@pytest.mark.parametrize("whole", [1, 5, 1000])
def test_steps_and_branches_of_any_size(step: int, whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "SHARE", 2.0)
    for name, value in (("LEAST", step), ("MOST", step), ("WHOLE", whole)):
        monkeypatch.setattr(frontier, name, value)
    trie = CatalogueTrie(ANSWERS)
    full = score_catalogue(MODEL, PROMPTS, trie, 0)
    assert_same(top_answers(MODEL, PROMPTS, trie, 9, 0), [ranked(row, trie, 9, set()) for row in full], full)


def test_a_search_that_is_cut_short_says_so() -> None:
    trie = CatalogueTrie(ANSWERS)
    [whole] = top_answers(MODEL, PROMPTS[1:2], trie, 25, 0, most_nodes=trie.nodes)
    [short] = top_answers(MODEL, PROMPTS[1:2], trie, 25, 0, most_nodes=3)
    assert whole.exact
    assert not short.exact and short.read <= 3 + frontier.WHOLE
    scores = score_catalogue(MODEL, PROMPTS[1:2], trie, 0)[0]
    assert short.scores == pytest.approx(scores[short.places].tolist(), abs=1e-10)
    assert all(one <= other for one, other in zip(short.scores, whole.scores, strict=False))


def test_fewer_answers_than_wanted() -> None:
    trie = CatalogueTrie([[3, 4], [3, 5], [6]])
    [found] = top_answers(MODEL, [[7]], trie, 10, 0, excluded=[{1}])
    assert sorted(found.places) == [0, 2]
    assert found.exact
    [none] = top_answers(MODEL, [[7]], trie, 10, 0, excluded=[{0, 1, 2}])
    assert (none.places, none.scores, none.exact) == ([], [], True)


def test_equal_answers_come_in_the_catalogues_order() -> None:
    trie = CatalogueTrie([[3, 4], [5], [3, 4], [3, 4]])
    [found] = top_answers(MODEL, [[7]], trie, 4, 0, most_nodes=10)
    assert [place for place in found.places if place != 1] == [0, 2, 3]
    [found] = top_answers(MODEL, [[7]], trie, 4, 0)
    assert [place for place in found.places if place != 1] == [0, 2, 3]


@pytest.mark.parametrize(("name", "attention"), [("llama", "eager"), ("llama", "flex_attention"), ("gemma2", "eager")])
def test_other_attention(name: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "SHARE", 1.0)
    model, trie = make(name, attention="eager"), CatalogueTrie(ANSWERS)
    full = score_catalogue(model, PROMPTS, trie, 0)
    model.set_attn_implementation(attention)
    found = top_answers(model, PROMPTS, trie, 5, 0)
    assert_same(found, [ranked(row, trie, 5, set()) for row in full], full, 1e-3)
    assert model.config._attn_implementation == attention


def test_a_model_that_takes_no_trees_gets_the_whole_ranking_with_a_warning() -> None:
    model, trie = make("mistral", torch.float64, sliding_window=4), CatalogueTrie(ANSWERS)
    with pytest.warns(UserWarning, match="every answer of the catalogue is read with a prompt of its own: its sliding"):
        found = top_answers(model, PROMPTS[1:3], trie, 4, 0)
    with pytest.warns(UserWarning, match="sliding"):
        full = score_catalogue(model, PROMPTS[1:3], trie, 0)
    assert_same(found, [ranked(row, trie, 4, set()) for row in full], full)


@pytest.mark.parametrize("batch_tokens", [1, 50, 10**6])
def test_batches_of_any_size(batch_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "SHARE", 1.0)
    trie = CatalogueTrie(ANSWERS)
    full = score_catalogue(MODEL, PROMPTS, trie, 0)
    found = top_answers(MODEL, PROMPTS, trie, 3, 0, batch_tokens=batch_tokens)
    assert_same(found, [ranked(row, trie, 3, set()) for row in full], full)


@pytest.mark.parametrize("seed", range(10))
def test_fifty_prompts_of_each_of_ten_catalogues(seed: int) -> None:
    """Answers over a wider vocabulary, of which few share more than a beginning."""
    generator = random.Random(seed)
    trie = CatalogueTrie(some_answers(generator.randint(50, 300), seed, tokens=generator.choice([4, 12, 30])))
    prompts = [[generator.randrange(3, 40) for _ in range(generator.randint(1, 12))] for _ in range(50)]
    count = generator.randint(1, 20)
    full = score_catalogue(MODEL, prompts, trie, 0)
    found = top_answers(MODEL, prompts, trie, count, 0, most_nodes=10**6)
    assert_same(found, [ranked(row, trie, count, set()) for row in full], full)


ids = st.lists(st.integers(3, 5), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(
    answers=st.lists(ids, min_size=1, max_size=30),
    prompts=st.lists(ids, min_size=1, max_size=3),
    count=st.integers(1, 8),
    normalised=st.booleans(),
    barred=st.sets(st.integers(0, 29), max_size=5),
)
def test_any_catalogue(
    answers: list[list[int]], prompts: list[list[int]], count: int, normalised: bool, barred: set[int]
) -> None:
    trie = CatalogueTrie(answers)
    some = {place for place in barred if place < len(answers)}
    full = score_catalogue(MODEL, prompts, trie, 0)
    expected = [ranked(row, trie, count, some, normalised) for row in full]
    arguments = {"excluded": [some] * len(prompts), "length_normalised": normalised}
    for most in (None, 10**6):
        found = top_answers(MODEL, prompts, trie, count, 0, most_nodes=most, **arguments)
        assert_same(found, expected, full / trie.lengths if normalised else full)


def test_what_makes_no_sense_is_refused() -> None:
    trie = CatalogueTrie(ANSWERS)
    for arguments, message in (
        (([[3], []], trie, 1, 0), "prompt 2 is empty"),
        (([], trie, 1, 0), "there is none"),
        (([[3]], trie, 0, 0), "count is 0: give 1 or more"),
    ):
        with pytest.raises(UserError, match=message):
            top_answers(MODEL, *arguments)
    with pytest.raises(UserError, match="most_nodes is 0: give 1 or more"):
        top_answers(MODEL, [[3]], trie, 1, 0, most_nodes=0)
