from __future__ import annotations

import itertools
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rankwise.errors import UserError
from rankwise.preferences import negatives
from rankwise.preferences.negatives import (
    TOO_FEW,
    UNKNOWN_SEEN,
    Catalogue,
    check_negatives,
    draw_negatives,
    negatives_at,
    stages_of_negatives,
)

NAMES = ["ape", "bee", "cat", "dog", "elk", "fox", "gnu", "hen"]
POPULARITY = [8, 1, 0, 2, 5, 1, 3, 4]
KINDS = ["given", "candidates", "uniform", "popularity", "in-batch", "hard"]
LEAST = 1e-4  # a p-value below it would be a wrong law; the seeds are fixed, so that nothing is left to chance


def catalogue(alpha: float = 1.0) -> Catalogue:
    return Catalogue(NAMES, POPULARITY, alpha)


def draws(kind: str, row: dict, count: int, times: int, alpha: float = 1.0, **others) -> list[negatives.Drawn]:
    found = catalogue(alpha)
    return [
        draw_negatives(row, count, kind, seed=3, number=1, draw=number, catalogue=found, **others)
        for number in range(times)
    ]


def chances(alpha: float, excluded: set[str]) -> dict[str, float]:
    """The exact probability of each answer in a single draw."""
    weights = {
        name: value**alpha for name, value in zip(NAMES, POPULARITY, strict=True) if name not in excluded and value > 0
    }
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def p_value(found: Counter, expected: dict) -> float:
    assert set(found) <= set(expected)
    times = sum(found.values())
    return stats.chisquare([found[key] for key in expected], [times * share for share in expected.values()]).pvalue


@pytest.mark.parametrize("seen", [[], ["bee", "cat", "unknown"]])
def test_single_uniform_draws_are_even_over_what_is_left(seen: list[str]) -> None:
    row = {"chosen": "ape", "seen": seen}
    left = set(NAMES) - {"ape", *seen}
    found = draws("uniform", row, 1, 1000)
    assert p_value(Counter(drawn.answers[0] for drawn in found), dict.fromkeys(sorted(left), 1 / len(left))) > LEAST
    assert all(drawn.weights == [1.0] for drawn in found)


@pytest.mark.parametrize("alpha", [0.0, 0.75, 1.0, 2.0])
def test_single_draws_by_popularity_have_its_power(alpha: float) -> None:
    expected = chances(alpha, {"ape", "gnu"})
    found = draws("popularity", {"chosen": "ape", "seen": ["gnu"]}, 1, 1000, alpha)
    assert p_value(Counter(drawn.answers[0] for drawn in found), expected) > LEAST
    for drawn in found:
        name, weight = drawn.answers[0], drawn.weights[0]
        assert weight == pytest.approx(1 / len(expected) / expected[name], rel=1e-12)


@pytest.mark.parametrize("tries", [0, 1, 100])
def test_several_draws_by_popularity_are_successive_draws_without_replacement(
    tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an ordered pair: w_i / W, then w_j / (W - w_i); by arrival times, by rejection and these, by rejection."""
    monkeypatch.setattr(negatives, "TRIES", tries)
    single = chances(1.0, {"ape", "hen"})
    expected = {(i, j): single[i] * single[j] / (1 - single[i]) for i, j in itertools.permutations(single, 2)}
    found = draws("popularity", {"chosen": "ape", "seen": ["hen"]}, 2, 1500)
    assert sum(expected.values()) == pytest.approx(1)
    assert p_value(Counter(tuple(drawn.answers) for drawn in found), expected) > LEAST


@pytest.mark.parametrize("tries", [0, 1, 100])
def test_several_uniform_draws_give_every_set_alike(tries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(negatives, "TRIES", tries)
    sets = [frozenset(three) for three in itertools.combinations(NAMES[2:], 3)]
    found = draws("uniform", {"chosen": "ape", "seen": ["bee"]}, 3, 1200)
    assert p_value(Counter(frozenset(drawn.answers) for drawn in found), dict.fromkeys(sets, 1 / len(sets))) > LEAST


@pytest.mark.parametrize("kind", ["candidates", "in-batch"])
def test_draws_from_a_list_give_every_set_alike(kind: str) -> None:
    listed = ["ape", "dog", "bee", "dog", "cat", "elk", "fox"]
    row = {"chosen": "ape", "seen": ["fox"], "candidates": listed}
    sets = [frozenset(pair) for pair in itertools.combinations(["dog", "bee", "cat", "elk"], 2)]
    found = draws(kind, row, 2, 800, others=listed)
    assert p_value(Counter(frozenset(drawn.answers) for drawn in found), dict.fromkeys(sets, 1 / 6)) > LEAST
    assert all(drawn.weights == [1.0, 1.0] for drawn in found)


@pytest.mark.parametrize("kind", ["given", "hard"])
def test_the_first_of_a_list_are_taken(kind: str) -> None:
    listed = ["dog", "ape", "cat", "dog", "bee", "elk"]
    row = {"chosen": "ape", "seen": ["cat"], "rejected": listed}
    assert draws(kind, row, 2, 2, others=listed) == [(["dog", "bee"], [1.0, 1.0])] * 2


def test_answers_of_one_name_are_one_and_as_popular_as_all_of_them() -> None:
    found = Catalogue(["a", "A", "b"], [1, 2, 4], 2.0).merged(["a", "a", "b"])
    assert found.answers == ["a", "b"]
    assert found.draw(random.Random(0), {1}, 2, by_popularity=True) == ([0], [1.0])
    weights = dict(zip(*found.draw(random.Random(0), (), 2, by_popularity=True), strict=True))
    assert weights == pytest.approx({0: (9 + 16) / 2 / 9, 1: (9 + 16) / 2 / 16})
    assert Catalogue(["a", "A"]).merged(["a", "a"]).answers == ["a"]


def test_the_weights_turn_sums_by_popularity_into_even_ones() -> None:
    """E_q[w f] is the mean of f over all that might have been drawn."""
    values = dict(zip(NAMES, np.random.default_rng(0).normal(size=len(NAMES)), strict=True))
    exact = chances(1.0, {"ape"})
    weights = {d.answers[0]: d.weights[0] for d in draws("popularity", {"chosen": "ape"}, 1, 300)}
    assert weights.keys() == exact.keys()
    estimated = sum(exact[name] * weights[name] * values[name] for name in exact)
    assert estimated == pytest.approx(np.mean([values[name] for name in exact]), rel=1e-12)


texts = st.lists(st.sampled_from([*NAMES, "unknown"]), max_size=6)


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    chosen=st.sampled_from([*NAMES, "other"]),
    seen=texts,
    listed=texts,
    count=st.integers(1, 10),
    seed=st.integers(0, 3),
    draw=st.integers(0, 3),
)
def test_whatever_is_excluded_is_never_drawn_and_all_that_is_left_can_be(
    kind: str, chosen: str, seen: list[str], listed: list[str], count: int, seed: int, draw: int
) -> None:
    row = {"chosen": chosen, "seen": seen, "rejected": listed, "candidates": listed}
    pools = {"uniform": NAMES, "popularity": [name for name in NAMES if name != "cat"]}
    left = set(pools.get(kind, listed)) - {chosen, *seen}
    arguments = {"seed": seed, "number": 5, "draw": draw, "catalogue": catalogue(), "others": listed}
    if not left:
        with pytest.raises(UserError, match=f"preference row 5 has no negative: of kind '{kind}' there is none"):
            draw_negatives(row, count, kind, **arguments)
        return
    drawn = draw_negatives(row, count, kind, **arguments)
    assert len(drawn.answers) == len(set(drawn.answers)) == min(count, len(left))
    assert set(drawn.answers) <= left
    assert len(drawn.weights) == len(drawn.answers)
    assert draw_negatives(row, count, kind, **arguments) == drawn


@pytest.mark.parametrize("kind", ["candidates", "uniform", "popularity", "in-batch"])
def test_seed_row_and_draw_each_change_what_is_drawn(kind: str) -> None:
    names = [f"film {number}" for number in range(1000)]
    row = {"chosen": "x", "candidates": names}
    found = Catalogue(names, [1.0] * 1000)
    places = [(0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1), (1, 11, 1), (11, 1, 1), (1, 1, 11)]
    drawn = {
        tuple(draw_negatives(row, 5, kind, seed=s, number=n, draw=d, catalogue=found, others=names).answers)
        for s, n, d in places
    }
    assert len(drawn) == len(places)


def test_one_rejected_text_is_a_list_of_one() -> None:
    row = {"chosen": "ape", "rejected": "bee"}
    assert draw_negatives(row, 3, "given", seed=0, number=1, draw=0).answers == ["bee"]
    assert check_negatives([row], 2, "given") == {TOO_FEW: 1}


def test_missing_columns_are_as_empty_ones() -> None:
    row = {"chosen": "ape", "seen": None, "rejected": None}
    assert len(draw_negatives(row, 7, "uniform", seed=0, number=1, draw=0, catalogue=catalogue()).answers) == 7
    with pytest.raises(UserError, match="preference row 1 has no negative: of kind 'given'"):
        draw_negatives(row, 7, "given", seed=0, number=1, draw=0)


class Counting(random.Random):
    """Counts what is drawn from it."""

    calls = 0

    def random(self) -> float:
        self.calls += 1
        return super().random()


@pytest.mark.parametrize("by_popularity", [False, True])
def test_a_draw_from_a_large_catalogue_looks_at_few_of_it(by_popularity: bool) -> None:
    found = Catalogue([f"film {number}" for number in range(50_000)], [1 / (1 + n) for n in range(50_000)])
    generator = Counting(0)
    places, weights = found.draw(generator, set(range(100)), 15, by_popularity)
    assert len(set(places)) == 15 and min(places) >= 100 and len(weights) == 15
    assert generator.calls < 100


def test_a_skewed_catalogue_ends_all_the_same() -> None:
    """Nearly all chance lies on what is excluded; what is left is drawn in proportion."""
    found = Catalogue(["a", "b", "c", "d"], [1e12, 3.0, 1.0, 0.0])
    first = Counter(found.draw(random.Random(number), {0}, 2, True)[0][0] for number in range(400))
    assert p_value(first, {1: 0.75, 2: 0.25}) > LEAST
    assert sorted(found.draw(random.Random(0), {0}, 9, True)[0]) == [1, 2]


def test_what_is_short_is_counted() -> None:
    rows = [
        {"chosen": "ape", "seen": NAMES[1:5]},
        {"chosen": "bee", "seen": ["a film", "ape"]},
        {"chosen": "bee", "seen": NAMES[:6]},
    ]
    assert check_negatives(rows, 3, "uniform", catalogue()) == {TOO_FEW: 1, UNKNOWN_SEEN: 1}
    assert check_negatives(rows, 1, "hard", catalogue()) == {UNKNOWN_SEEN: 1}
    assert check_negatives(rows[1:2], 6, "popularity", catalogue()) == {TOO_FEW: 1, UNKNOWN_SEEN: 1}
    assert check_negatives(rows[1:2], 5, "popularity", catalogue()) == {UNKNOWN_SEEN: 1}
    assert check_negatives(rows, 3, "in-batch") == {}
    listed = [{"chosen": "a", "candidates": ["a", "b", "c", "c"]}, {"chosen": "a", "candidates": ["b", "c", "d"]}]
    assert check_negatives(listed, 3, "candidates") == {TOO_FEW: 1}


def test_mistakes_in_rows_are_named_before_training() -> None:
    fine = {"chosen": "ape", "rejected": ["bee"]}
    with pytest.raises(UserError, match="preference row 2 has no negative: of kind 'given' there is none but"):
        check_negatives([fine, {"chosen": "ape", "rejected": ["ape", "bee"], "seen": ["bee"]}], 1, "given")
    with pytest.raises(UserError, match="preference row 1: candidates is a text, 'bee'; give a list of texts"):
        check_negatives([{"chosen": "ape", "candidates": "bee"}], 1, "candidates")
    for chosen in (None, "", [{"role": "assistant", "content": "ape"}]):
        with pytest.raises(
            UserError, match=r"preference row 2: chosen is .*, and negatives are drawn for a text alone"
        ):
            check_negatives([fine, {"chosen": chosen, "rejected": ["bee"]}], 1, "given")
    with pytest.raises(UserError, match="preference row 2: seen is a text, 'bee'; give a list of texts"):
        check_negatives([fine, {"chosen": "ape", "seen": "bee"}], 1, "uniform", catalogue())
    with pytest.raises(UserError, match="row 1: 'ape' is drawn from, which is the chosen ' ape' but for spaces: write"):
        check_negatives([{"chosen": " ape", "candidates": ["bee", "ape"]}], 1, "candidates")
    with pytest.raises(UserError, match="none of 3 seen answers is in the catalogue: write them as they stand in it"):
        check_negatives(
            [{"chosen": "ape", "seen": [" ape", " bee"]}, {"chosen": "ape", "seen": ["x"]}], 1, "uniform", catalogue()
        )
    with pytest.raises(UserError, match="preference row 1 has no negative: of kind 'popularity'"):
        check_negatives([{"chosen": "ape", "seen": [*NAMES[1:2], *NAMES[3:]]}], 1, "popularity", catalogue())


def test_mistakes_in_settings_are_named() -> None:
    with pytest.raises(UserError, match="negatives of kind 'unifrom' are unknown; did you mean 'uniform'"):
        check_negatives([], 1, "unifrom")
    with pytest.raises(UserError, match="0 negatives a row are not possible: give 1 or more"):
        check_negatives([], 0, "given")
    for call in (lambda row: check_negatives([row], 1, "uniform"), lambda row: draws_without(row)):
        with pytest.raises(UserError, match="'uniform' are drawn from a catalogue of answers, and none is given"):
            call({"chosen": "ape"})
    with pytest.raises(UserError, match="by popularity need a catalogue that has the popularity of each answer"):
        check_negatives([{"chosen": "ape"}], 1, "popularity", Catalogue(NAMES))


def draws_without(row: dict) -> None:
    draw_negatives(row, 1, "uniform", seed=0, number=1, draw=0)


@pytest.mark.parametrize(
    ("answers", "popularity", "alpha", "message"),
    [
        ([], None, 1.0, "has to have answers to draw from, and this one has none"),
        (["a", "", "b"], None, 1.0, "answer 2 of the catalogue is an empty text: leave it out"),
        (["a", "b", "a"], None, 1.0, "the catalogue has 'a' twice: give each answer once"),
        (["a", "b"], [1], 1.0, "the catalogue has 2 answers and 1 popularities: give each one"),
        (["a", "b"], [1, -1], 1.0, "popularity -1 of 'b' is not possible: it is 0 or more, and finite"),
        (["a", "b"], [float("nan"), 1.0], 1.0, "popularity nan of 'a' is not possible"),
        (["a", "b"], [0, 0], 1.0, "all popularities of the catalogue are 0"),
        (["a", "b"], [1, 2], -0.5, "alpha -0.5 is not possible: the power of popularity is 0 or more, and finite"),
    ],
)
def test_mistakes_in_a_catalogue_are_named(answers: list, popularity: list | None, alpha: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Catalogue(answers, popularity, alpha)


def test_large_powers_stay_finite() -> None:
    found = Catalogue(["a", "b"], [1e300, 1e299], 300.0)
    assert found.draw(random.Random(0), (), 1, True) == ([0], [pytest.approx(0.5, rel=1e-12)])


def test_stages_of_one_length_and_of_given_lengths() -> None:
    even = stages_of_negatives([1, 3, 8])
    assert [negatives_at(even, share) for share in (0.0, 0.33, 0.34, 0.66, 0.67, 1.0)] == [1, 1, 3, 3, 8, 8]
    own = stages_of_negatives([1, 3, 3], [0, 0.1, 0.8])
    assert own == [(0.0, 1), (0.1, 3), (0.8, 3)]
    assert [negatives_at(own, share) for share in (0.0, 0.0999, 0.1, 1.0)] == [1, 1, 3, 3]
    assert negatives_at(stages_of_negatives([4]), 0.5) == 4


@pytest.mark.parametrize(
    ("counts", "starts", "message"),
    [
        ([], None, r"negatives \[\] are not possible: give 1 or more for each stage"),
        ([0, 1], None, r"negatives \[0, 1\] are not possible"),
        ([3, 1], None, r"negatives \[3, 1\] fall: their number stays or grows"),
        ([1, 3], [0.0], "2 stages of negatives have 1 starts: give each one"),
        ([1, 3], [0.1, 0.5], r"starts of stages \[0.1, 0.5\] are not possible: shares of training, from 0, rising"),
        ([1, 3], [0, 0], r"starts of stages \[0, 0\] are not possible"),
        ([1, 3], [0, 1], r"starts of stages \[0, 1\] are not possible"),
    ],
)
def test_mistakes_in_stages_are_named(counts: list[int], starts: list | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        stages_of_negatives(counts, starts)
