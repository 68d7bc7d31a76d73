"""Intervals and paired tests, against closed forms and enumeration; and what lists are like, by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.errors import UserError
from rankwise.recommend.lists import activity_groups, coverage, novelty, popularity_groups, popularity_lift
from rankwise.recommend.uncertainty import by_group, compare_paired, mean_interval


def test_the_interval_is_about_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(1).exponential(size=2000)
    found = mean_interval(values)
    error = values.std(ddof=1) / math.sqrt(len(values))
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
    wider = mean_interval(values, level=0.99)
    assert wider.low < found.low < found.high < wider.high
    assert mean_interval(values) == found
    assert mean_interval(values, seed=1) != found


def test_hits_have_the_interval_of_the_binomial_distribution() -> None:
    """30 of 100: a resample has a binomial number of hits, whose 2.5 % and 97.5 % points are 21 and 39."""
    hits = np.array([1.0] * 30 + [0.0] * 70)
    found = mean_interval(hits, resamples=20000)
    assert found.low == pytest.approx(0.21, abs=0.011)
    assert found.high == pytest.approx(0.39, abs=0.011)


def test_about_as_many_intervals_hold_the_truth_as_they_say() -> None:
    generator = np.random.default_rng(2)
    held = 0
    for _ in range(200):
        found = mean_interval((generator.random(60) < 0.3).astype(float), level=0.8, resamples=300)
        held += found.low <= 0.3 <= found.high
    assert 140 <= held <= 178  # of 200, 160 expected


pairs = st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 1.0])), min_size=2, max_size=8)


@settings(max_examples=40, deadline=None)
@given(pairs)
def test_the_paired_test_is_the_share_of_exchanges_that_differ_as_much(given_pairs: list[tuple[float, float]]) -> None:
    values, others = (np.array(part) for part in zip(*given_pairs, strict=True))
    differences = values - others
    observed = differences.mean()
    signs = np.array(list(itertools.product([1, -1], repeat=len(differences))))
    means = (signs * differences).mean(axis=1)
    p = min(1.0, 2 * min((means >= observed - 1e-12).mean(), (means <= observed + 1e-12).mean()))
    found = compare_paired(values, others)
    assert found.difference == pytest.approx(observed)
    assert found.p == pytest.approx(p)


def test_a_clear_difference_is_one_and_none_is_none() -> None:
    generator = np.random.default_rng(3)
    others = generator.random(400)
    better = np.clip(others + 0.1 + 0.05 * generator.standard_normal(400), 0, 2)
    found = compare_paired(better, others)
    assert found.low > 0.08
    assert found.p == pytest.approx(1 / 2001, rel=1.1)
    assert compare_paired(others, others) == (0.0, 0.0, 0.0, 1.0)


def test_groups_apart() -> None:
    found = by_group(np.array([1.0, 0.0, 1.0, 1.0, 0.0]), np.array(["b", "a", "b", "a", "a"]))
    assert list(found) == ["a", "b"]
    assert found["a"][0] == 3
    assert found["a"][1].mean == pytest.approx(1 / 3)
    assert found["b"] == (2, (1.0, 1.0, 1.0))


def test_what_cannot_be_compared_is_refused() -> None:
    for values, message in ((np.array([]), "there is no case"), (np.array([1.0, np.nan]), "the value of case 2")):
        with pytest.raises(UserError, match=message):
            mean_interval(values)
    with pytest.raises(UserError, match=r"level 95\.0 must lie between 0 and 1"):
        mean_interval(np.array([1.0]), level=95.0)
    with pytest.raises(UserError, match="2 values and 1 others"):
        compare_paired(np.array([1.0, 2.0]), np.array([1.0]))
    with pytest.raises(UserError, match="1 values and 2 groups"):
        by_group(np.array([1.0]), np.array(["a", "b"]))


POPULARITY = {"a": 5, "b": 3, "c": 1}
CATALOGUE = ["a", "b", "c", "d"]


def test_coverage_counts_titles_once() -> None:
    assert coverage([["a", "b"], ["a"], []], CATALOGUE) == 0.5
    assert coverage([[]], CATALOGUE) == 0.0
    with pytest.raises(UserError, match="'x' is recommended, and is not in the catalogue"):
        coverage([["x"]], CATALOGUE)
    with pytest.raises(UserError, match="the catalogue is empty"):
        coverage([], [])


def test_novelty_is_in_bits() -> None:
    """Of 9 interactions and 4 titles: shares of 6, 4, 2 and 1 of 13."""
    expected = (math.log2(13 / 6) + math.log2(13 / 1)) / 2
    assert novelty([["a"], ["d"]], POPULARITY, CATALOGUE) == pytest.approx(expected)
    assert novelty([["a"]], {}, ["a", "b"]) == 1.0
    with pytest.raises(UserError, match="nothing is recommended"):
        novelty([[]], POPULARITY, CATALOGUE)


def test_the_lift_is_over_users() -> None:
    lists, histories = [["a", "b"], ["a"]], [["c"], ["b", "b", "c"]]
    expected = (4 + 5) / (1 + 7 / 3) - 1
    assert popularity_lift(lists, histories, POPULARITY) == pytest.approx(expected)
    assert popularity_lift(histories, histories, POPULARITY) == 0.0
    for arguments, message in (
        ((lists, histories[:1], POPULARITY), "2 lists and 1 histories"),
        ((lists, [["a"], []], POPULARITY), "list 2 is empty"),
        ((lists, [["d"], ["d"]], POPULARITY), "no title of a history occurs"),
    ):
        with pytest.raises(UserError, match=message):
            popularity_lift(*arguments)


def test_a_third_of_the_interactions_is_the_head() -> None:
    popularity = {"a": 4, "b": 3, "c": 2, "d": 2, "e": 1, "f": 0}  # 12: the head has 4, the middle 4 more
    groups = popularity_groups(["a", "b", "c", "d", "e", "f", "new"], popularity)
    assert groups.tolist() == ["1 head", "2 middle", "2 middle", *["3 tail"] * 4]


def test_users_are_grouped_by_thirds_of_the_cases() -> None:
    assert (
        activity_groups([3, 9, 4, 8, 5, 7]).tolist()
        == ["1 up to 4", "3 more", "1 up to 4", "3 more"] + ["2 up to 7"] * 2
    )
    assert set(activity_groups([5] * 10)) == {"1 up to 5"}
    numbers = np.random.default_rng(0).integers(2, 200, 999)
    sizes = np.unique(activity_groups(numbers.tolist()), return_counts=True)[1]
    assert sizes.min() > 300
