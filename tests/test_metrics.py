from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from rankwise.recommend import case_metrics, ranking_metrics, substring_protocol
from rankwise.recommend.metrics import possible_ranks


def test_worked_by_hand() -> None:
    """The target is third of four: HR@1 0, HR@3 1, NDCG@3 = 1 / log2(4) = 1/2, reciprocal rank 1/3."""
    values = case_metrics(np.array([0.1, 0.9, 0.4, 0.7]), 2, cutoffs=(1, 2, 3))
    assert values == pytest.approx({"HR@1": 0, "HR@2": 0, "HR@3": 1, "NDCG@2": 0, "NDCG@3": 0.5, "MRR": 1 / 3})


def test_means_over_cases_of_different_length() -> None:
    """Ranks 1 of 2 and 2 of 3: HR@1 1/2, MRR (1 + 1/2) / 2, NDCG@5 (1 + 1/log2(3)) / 2."""
    values = ranking_metrics([np.array([2.0, 1.0]), np.array([5.0, 4.0, 3.0])], [0, 1])
    assert values == pytest.approx({"HR@1": 0.5, "HR@5": 1.0, "NDCG@5": (1 + 1 / math.log2(3)) / 2, "MRR": 0.75})


def test_ties_are_worth_their_expectation() -> None:
    """One better, two tied with the target: ranks 2, 3, 4 with equal chance."""
    scores = np.array([9.0, 5.0, 5.0, 5.0, 1.0])
    assert possible_ranks(scores, 2) == range(2, 5)
    values = case_metrics(scores, 2, cutoffs=(1, 3))
    assert values["HR@1"] == 0
    assert values["HR@3"] == pytest.approx(2 / 3)
    assert values["NDCG@3"] == pytest.approx((1 / math.log2(3) + 1 / 2) / 3)
    assert values["MRR"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)


def test_constant_scores_are_worth_chance() -> None:
    values = case_metrics(np.zeros(20), 7)
    assert values["HR@1"] == pytest.approx(1 / 20)
    assert values["HR@5"] == pytest.approx(5 / 20)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=2, max_size=25), st.data())
def test_ndcg_is_that_of_scikit_learn(levels: list[int], data: st.DataObject) -> None:
    """scikit-learn averages the gain over tied items too, by another route."""
    scores = np.array(levels, dtype=np.float64)
    target = data.draw(st.integers(0, len(levels) - 1))
    relevance = np.zeros(len(levels))
    relevance[target] = 1
    for cutoff in (2, 5):
        expected = ndcg_score([relevance], [scores], k=cutoff)
        assert case_metrics(scores, target, (cutoff,))[f"NDCG@{cutoff}"] == pytest.approx(expected, abs=1e-12)


def test_wrong_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        case_metrics(np.array([0.0, np.nan]), 0)
    with pytest.raises(ValueError, match="no index of 2 scores"):
        case_metrics(np.array([0.0, 1.0]), 2)
    with pytest.raises(ValueError, match="1 rows of scores and 0 targets"):
        ranking_metrics([np.array([0.0, 1.0])], [])
    assert case_metrics(np.array([-np.inf, 1.0]), 1)["HR@1"] == 1


def test_the_papers_protocol_worked_by_hand() -> None:
    candidates = [["Alien", "Heat", "Jaws"]] * 5 + [["Fish", "Reel Big Fish"]]
    texts = [
        " Heat",  # right
        " I'd say JAWS!",  # valid, wrong
        " Alien or Heat",  # two: invalid
        " Speed",  # none: invalid
        " heat",  # right: letters' case is ignored
        " Reel Big Fish",  # the right answer holds two titles: cannot be won
    ]
    result = substring_protocol(texts, candidates, ["Heat"] * 5 + ["Reel Big Fish"])
    assert result.hit_rate == pytest.approx(2 / 6)
    assert result.hit_rate_valid == pytest.approx(2 / 3)
    assert result.valid_ratio == pytest.approx(3 / 6)
    assert (result.cases, result.cannot_be_won) == (6, 1)


def test_no_valid_text_gives_zero_and_no_case_is_refused() -> None:
    assert substring_protocol(["?"], [["A", "B"]], ["A"]).hit_rate_valid == 0.0
    with pytest.raises(ValueError, match="0 texts"):
        substring_protocol([], [], [])
