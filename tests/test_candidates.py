from __future__ import annotations

import math
from collections import Counter

import pytest

from rankwise.errors import UserError
from rankwise.recommend import Case, draw_candidates, draw_negatives, with_candidates
from rankwise.recommend.candidates import cannot_be_won

CATALOGUE = [f"film {number:03}" for number in range(200)]


def case_of(user: str, count: int = 30) -> Case:
    return Case(user, tuple(CATALOGUE[:5]), CATALOGUE[5], seen=frozenset(CATALOGUE[:count]))


@pytest.mark.parametrize("met", [6, 30, 150, 181])
def test_candidates_are_distinct_hold_the_target_once_and_nothing_else_that_was_seen(met: int) -> None:
    case = case_of("a", met)
    drawn = draw_candidates(case, CATALOGUE, 20, seed=0)
    assert len(drawn) == len(set(drawn)) == 20
    assert set(drawn) & case.seen == {case.target}


def test_a_draw_depends_on_seed_user_and_target_only() -> None:
    cases = [case_of(user) for user in "abc"]
    forward = {case.user: with_candidates(case, CATALOGUE, 20, seed=0).candidates for case in cases}
    backward = {case.user: with_candidates(case, CATALOGUE, 20, seed=0).candidates for case in cases[:0:-1]}
    assert backward == {user: forward[user] for user in "bc"}
    assert len(set(forward.values())) == 3
    assert draw_candidates(cases[0], CATALOGUE, 20, seed=1) != forward["a"]


def test_candidates_that_are_given_stay() -> None:
    case = Case("a", ("x",), "y", candidates=("y", "z"))
    assert with_candidates(case, CATALOGUE, 20, seed=0) == case


def test_the_target_has_no_favourite_place_and_others_are_drawn_evenly() -> None:
    drawn = [draw_candidates(case_of(f"u{number}"), CATALOGUE, 20, seed=0) for number in range(2000)]
    places = Counter(candidates.index(CATALOGUE[5]) for candidates in drawn)
    # each of 20 places expects 100; five standard deviations are about 49
    assert all(abs(places[place] - 100) < 5 * math.sqrt(95) for place in range(20))
    others = Counter(title for candidates in drawn for title in candidates if title != CATALOGUE[5])
    expected = 2000 * 19 / 170
    assert len(others) == 170
    assert all(abs(number - expected) < 5 * math.sqrt(expected) for number in others.values())


def test_a_small_catalogue_is_an_error_that_says_so() -> None:
    with pytest.raises(UserError, match="catalogue of 200 titles is too small: user 'a' has met 182 of them"):
        draw_candidates(case_of("a", 182), CATALOGUE, 20, seed=0)


def test_negatives_come_from_the_candidates_without_the_target() -> None:
    case = with_candidates(case_of("a"), CATALOGUE, 20, seed=0)
    negatives = draw_negatives(case, 3, seed=0)
    assert len(set(negatives)) == 3
    assert set(negatives) < set(case.candidates) - {case.target}
    assert draw_negatives(case, 3, seed=0) == negatives
    assert sorted(draw_negatives(case, 19, seed=0)) == sorted(set(case.candidates) - {case.target})
    for count in (0, 20):
        with pytest.raises(UserError, match=f"negatives = {count}: between 1 and 19"):
            draw_negatives(case, count, seed=0)


def test_a_wrong_title_inside_the_right_one_cannot_be_won() -> None:
    assert cannot_be_won(["Reel Big Fish", "fish"], "Reel Big Fish")
    assert not cannot_be_won(["Fish", "Reel Big Fish"], "Fish")
