from __future__ import annotations

import polars as pl
import pytest

from rankwise.errors import UserError
from rankwise.recommend import Case, leave_last_out
from rankwise.sampling import sample


def log_of(**users: str) -> pl.DataFrame:
    """Each user's titles are single letters, in the order of time."""
    rows = [(user, title, float(time)) for user, titles in users.items() for time, title in enumerate(titles)]
    return pl.DataFrame(rows, schema=["user", "title", "time"], orient="row")


def test_last_is_test_last_but_one_is_validation_and_the_rest_trains() -> None:
    split = leave_last_out(log_of(a="ABCDE"))
    seen = frozenset("ABCDE")
    assert split.train == [
        Case("a", ("A",), "B", seen=frozenset("ABC")),
        Case("a", ("A", "B"), "C", seen=frozenset("ABC")),
    ]
    assert split.validation == [Case("a", ("A", "B", "C"), "D", seen=seen)]
    assert split.test == [Case("a", ("A", "B", "C", "D"), "E", seen=seen)]
    assert split.catalogue == ["A", "B", "C", "D", "E"]
    assert split.popularity == {"A": 1, "B": 1, "C": 1}


def test_time_orders_and_the_file_breaks_ties() -> None:
    rows = [("a", "D", 9.0), ("a", "B", 1.0), ("b", "X", 0.0), ("a", "A", 1.0), ("a", "C", 5.0)]
    log = pl.DataFrame(rows, schema=["user", "title", "time"], orient="row")
    split = leave_last_out(log)
    assert split.test[0].history == ("B", "A", "C")
    assert split.test[0].target == "D"


def test_a_history_holds_the_latest_items_only() -> None:
    split = leave_last_out(log_of(a="ABCDEF"), history=2)
    assert split.test[0].history == ("D", "E")
    assert [case.history for case in split.train] == [("A",), ("A", "B"), ("B", "C")]


def test_a_longer_minimum_history_leaves_fewer_training_cases() -> None:
    split = leave_last_out(log_of(a="ABCDEF", b="XYZ"), minimum_history=3)
    assert [(case.history, case.target) for case in split.train] == [(("A", "B", "C"), "D")]
    assert [case.target for case in split.validation] == ["E", "Y"]
    assert [case.history for case in split.test] == [("A", "B", "C", "D", "E"), ("X", "Y")]


def test_users_with_too_short_a_history_are_dropped_and_counted() -> None:
    split = leave_last_out(log_of(a="ABC", b="AB", c="Z"))
    assert [case.user for case in split.test] == ["a"]
    assert split.counts == {
        "users": 1,
        "users with too short a history": 2,
        "interactions of users with too short a history": 3,
    }
    assert split.popularity == {"A": 1}
    assert "Z" in split.catalogue


def test_nothing_left_or_a_wrong_setting_is_an_error() -> None:
    with pytest.raises(UserError, match="none of 2 users has 3 interactions or more"):
        leave_last_out(log_of(a="AB", b="C"))
    with pytest.raises(UserError, match="minimum_interactions = 2"):
        leave_last_out(log_of(a="ABC"), minimum_interactions=2)
    with pytest.raises(UserError, match="history = 0"):
        leave_last_out(log_of(a="ABC"), history=0)


def test_sampling_keeps_order_is_seeded_and_says_what_it_left_out() -> None:
    cases = [Case("a", ("x",), str(number)) for number in range(100)]
    drawn, left_out = sample(cases, 30, seed=1)
    assert left_out == 70
    places = [int(case.target) for case in drawn]
    assert places == sorted(set(places))
    assert sample(cases, 30, seed=1)[0] == drawn != sample(cases, 30, seed=2)[0]
    assert sample(cases, None, seed=1) == sample(cases, 100, seed=1) == (cases, 0)
    with pytest.raises(UserError, match="a limit of 0 rows"):
        sample(cases, 0, seed=1)
