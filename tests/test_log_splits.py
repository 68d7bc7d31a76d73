"""What of a log trains and what is held out: by time, by user, as given, session by session."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from rankwise.errors import UserError
from rankwise.recommend import (
    InteractionColumns,
    InteractionSettings,
    SyntheticSettings,
    prepare_interactions,
    write_synthetic,
)
from rankwise.recommend.logs.cleaning import sessions
from small_logs import PARTS, written


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> InteractionSettings:
    ratings, items = write_synthetic(tmp_path_factory.mktemp("log"), SyntheticSettings(users=40))
    return InteractionSettings(ratings=ratings, items=items)


def test_nothing_is_learnt_from_what_came_later(small: InteractionSettings) -> None:
    """Every training target is older than every held-out one, and no history reaches beyond its target."""
    log = pl.read_csv(small.ratings).join(pl.read_csv(small.items or ""), on="item").rename({"timestamp": "time"})
    times = {(str(user), title): time for user, title, time in log.select("user", "title", "time").iter_rows()}
    prepared = prepare_interactions(replace(small, kind="time", holdout=0.2))
    at = {part: [times[row["user"], row["target"]] for row in getattr(prepared, part)] for part in PARTS}
    assert max(at["train"]) < min(at["validation"])
    assert max(at["validation"]) < min(at["test"])
    for part in PARTS:
        for row in getattr(prepared, part):
            assert max(times[row["user"], title] for title in row["history"]) <= times[row["user"], row["target"]]
    first = min(at["validation"])
    trained = log.filter(pl.col("time") < first)["title"].value_counts()
    assert prepared.popularity == dict(trained.iter_rows())
    later = set(prepared.catalogue) - set(prepared.popularity)
    assert later  # titles that nobody had met by then are no wrong answers either
    assert not later & {title.strip() for row in prepared.train for title in row["rejected"]}
    assert set(prepared.pool) == set(prepared.popularity)
    assert prepared.leaks["training interactions at or after the first test target"] == 0
    assert prepared.leaks["training interactions at or after the first validation target"] == 0


def test_dates_cut_the_log(tmp_path: Path) -> None:
    rows = [("a", item, f"2020-01-0{day}") for day, item in enumerate("PQRSTU", start=1)]
    log = written(tmp_path / "log.csv", [*rows, ("b", "X", "2020-01-01"), ("b", "Y", "2020-01-02")])
    asked = InteractionSettings(
        ratings=log, kind="time", validation_from="2020-01-04", test_from="2020-01-06", minimum_interactions=2,
        candidates=2, negatives=1,
    )  # fmt: skip
    prepared = prepare_interactions(asked)
    assert [row["target"] for row in prepared.train] == ["Q", "R", "Y"]
    assert [row["target"] for row in prepared.validation] == ["S", "T"]
    assert [row["target"] for row in prepared.test] == ["U"]
    assert prepared.train[0]["seen"] == {"P", "Q", "R"}
    assert prepared.test[0]["seen"] == set("PQRSTU")


def test_some_users_are_held_out(small: InteractionSettings) -> None:
    prepared = prepare_interactions(replace(small, kind="users", holdout=0.25))
    users = {part: {row["user"] for row in getattr(prepared, part)} for part in PARTS}
    assert not users["train"] & users["validation"]
    assert not users["train"] & users["test"]
    assert not users["validation"] & users["test"]
    assert len(users["test"]) == len(prepared.test)
    assert prepared.leaks["test targets of users who train too"] == 0
    assert sum(prepared.popularity.values()) == len(prepared.train) + len(users["train"])


def test_the_log_tells_the_parts(tmp_path: Path) -> None:
    rows = [("a", "P", 1, "train"), ("a", "Q", 2, "train"), ("a", "R", 3, "dev"), ("a", "S", 4, "Test"),
            ("b", "T", 1, "train"), ("b", "U", 2, "test"), ("b", "V", 3, "test")]  # fmt: skip
    log = written(tmp_path / "log.csv", rows, "user item time fold")
    asked = InteractionSettings(
        ratings=log, kind="given", rating_columns=InteractionColumns(part="fold"), candidates=2, negatives=1
    )
    prepared = prepare_interactions(asked)
    assert [row["target"] for row in prepared.train] == ["Q"]
    assert [row["target"] for row in prepared.validation] == ["R"]
    assert [row["target"] for row in prepared.test] == ["S", "U", "V"]
    written(tmp_path / "log.csv", [*rows, ("b", "W", 4, "tests")], "user item time fold")
    with pytest.raises(UserError, match="'tests' is no part of a split; did you mean 'test'"):
        prepare_interactions(asked)


def test_a_pause_begins_a_session() -> None:
    log = pl.DataFrame({"user": ["a"] * 4 + ["b"] * 2, "time": [0.0, 10.0, 21.0, 22.0, 0.0, 10.0]})
    found = sessions(log, gap=10.0)
    assert found["user"].to_list() == ["a/1", "a/1", "a/2", "a/2", "b/1", "b/1"]
    assert found["person"].to_list() == log["user"].to_list()


def test_an_item_returns_in_another_session_and_histories_are_of_the_last_one(tmp_path: Path) -> None:
    rows = [("a", item, time) for time, item in enumerate("PQRQ")] + [
        ("a", item, 100 + time) for time, item in enumerate("QST")
    ]
    rows += [("b", item, time) for time, item in enumerate("UVWX")]
    asked = InteractionSettings(
        ratings=written(tmp_path / "log.csv", rows), session_gap=50.0, candidates=2, negatives=1
    )
    prepared = prepare_interactions(asked)
    assert [(row["user"], row["history"], row["target"]) for row in prepared.test] == [
        ("a/1", ["P", "Q"], "R"),
        ("a/2", ["Q", "S"], "T"),
        ("b/1", ["U", "V", "W"], "X"),
    ]
    assert prepared.histories.rows() == [("a", ["Q", "S", "T"]), ("b", ["U", "V", "W", "X"])]
    assert prepared.counts["duplicate interactions"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "time", "validation_from": "2020-01-01"}, "validation_from and test_from, or neither"),
        ({"kind": "time", "validation_from": 2, "test_from": 1}, "validation_from = 2 is not before test_from = 1"),
        ({"kind": "time", "validation_from": "soon", "test_from": 1}, "'soon' is no time"),
        ({"holdout": 0.5}, "holdout = 0.5: between 0 and 0.5"),
        ({"core": 1000}, "core = 1000: no user and item with as many"),
        ({"minimum_interactions": 2}, "minimum_interactions = 2: at least 3"),
        ({"kind": "users", "minimum_interactions": 1}, "minimum_interactions = 1: at least 2"),
    ],
)
def test_wrong_settings_of_a_log_are_refused(small: InteractionSettings, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare_interactions(replace(small, **changes))


def test_one_time_for_all_cannot_be_cut(tmp_path: Path) -> None:
    rows = [("a", item, 5) for item in "PQRST"]
    with pytest.raises(UserError, match="cannot be cut by time"):
        prepare_interactions(InteractionSettings(ratings=written(tmp_path / "log.csv", rows), kind="time"))


def test_sessions_of_a_person_are_on_one_side(tmp_path: Path) -> None:
    rows = [(f"u{user}", f"i{user}-{item}", 1000 * (item // 4) + item) for user in range(40) for item in range(12)]
    asked = InteractionSettings(
        ratings=written(tmp_path / "log.csv", rows), session_gap=500.0, kind="users", holdout=0.25
    )
    prepared = prepare_interactions(asked)
    people = {part: {row["user"].split("/")[0] for row in getattr(prepared, part)} for part in PARTS}
    assert not people["train"] & people["test"]
    assert prepared.leaks["test targets of users who train too"] == 0


def test_a_training_history_has_no_item_that_is_held_out(tmp_path: Path) -> None:
    rows = [("a", "P", 1, "train"), ("a", "Q", 2, "test"), ("a", "R", 3, "train"), ("a", "S", 4, "test"),
            ("b", "T", 1, "train")]  # fmt: skip
    asked = InteractionSettings(
        ratings=written(tmp_path / "log.csv", rows, "user item time part"), kind="given",
        rating_columns=InteractionColumns(part="part"), candidates=2, negatives=1,
    )  # fmt: skip
    prepared = prepare_interactions(asked)
    assert [(row["history"], row["target"]) for row in prepared.train] == [(["P"], "R")]
    assert [(row["history"], row["target"]) for row in prepared.test] == [(["P"], "Q"), (["P", "Q", "R"], "S")]


def test_an_empty_part_is_refused(small: InteractionSettings) -> None:
    late = replace(small, kind="time", validation_from="2090-01-01", test_from="2091-01-01")
    with pytest.raises(UserError, match=r"by time leaves no validation case with a history; times go from \d+ to"):
        prepare_interactions(late)
    with pytest.raises(UserError, match="'nan' is no time"):
        prepare_interactions(replace(late, test_from="nan"))
