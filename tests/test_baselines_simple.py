from __future__ import annotations

import numpy as np
import pytest

from rankwise.recommend import popularity_scores, random_scores, ranking_metrics, target_places


def test_random_is_the_expectation_of_random_orders() -> None:
    candidates = [[str(number) for number in range(20)]] * 4000
    expected = ranking_metrics(random_scores(candidates[:1]), [3])
    drawn = ranking_metrics(list(np.random.default_rng(0).random((4000, 20))), [3] * 4000)
    for name, value in expected.items():
        assert drawn[name] == pytest.approx(value, abs=0.03)
    assert expected["HR@1"] == pytest.approx(0.05)


def test_popularity_ranks_by_training_counts() -> None:
    scores = popularity_scores([["a", "b", "new"], ["b", "new"]], {"a": 2, "b": 5})
    assert [list(one) for one in scores] == [[2, 5, 0], [5, 0]]
    assert ranking_metrics(scores, [1, 1])["HR@1"] == 0.5


def test_places_of_the_targets() -> None:
    assert target_places([["a", "b"], ("c", "d")], ["b", "c"]) == [1, 0]
    with pytest.raises(ValueError):
        target_places([["a", "b"]], ["z"])
