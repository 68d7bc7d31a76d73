from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rankwise.errors import UserError
from rankwise.recommend import (
    Case,
    PublishedSettings,
    prepare_published,
    read_candidate_lists,
    read_names,
    read_windows,
)

GOOD: dict[str, Any] = {"historyList": "A::B::C", "itemList": ["D", "E", "F"], "trueSelection": "E"}


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def test_candidate_lists_are_read_as_they_are(tmp_path: Path) -> None:
    cases, counts = read_candidate_lists(write(tmp_path / "test.json", [GOOD]))
    seen = frozenset({"A", "B", "C", "E"})
    assert cases == [Case("test-0", ("A", "B", "C"), "E", ("D", "E", "F"), seen)]
    assert counts == {"cases read": 1}


def test_cases_that_cannot_serve_are_dropped_and_counted(tmp_path: Path) -> None:
    content = [
        GOOD,
        GOOD | {"trueSelection": "Z"},
        GOOD | {"historyList": ""},
        GOOD | {"itemList": []},
        GOOD | {"itemList": ["E", "D", "D"]},
        GOOD | {"itemList": "D::E"},
        {"historyList": "A"},
        "no case",
    ]
    cases, counts = read_candidate_lists(write(tmp_path / "test.json", content))
    assert len(cases) == 1
    assert counts == {
        "cases read": 8,
        "cases whose target is no candidate": 1,
        "cases with an empty list": 2,
        "cases with a candidate twice": 1,
        "unparsable cases": 3,
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty"),
        ("{", "no valid JSON"),
        ({"a": 1}, "must be a JSON list of cases with historyList"),
        ([], "no usable case of 0"),
        ([GOOD | {"trueSelection": "Z"}], r"no usable case of 1 \(1 cases whose target is no candidate\)"),
    ],
)
def test_a_file_without_cases_is_an_error(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_candidate_lists(write(tmp_path / "test.json", content))


def test_names_are_read_and_a_wrong_line_is_named(tmp_path: Path) -> None:
    assert read_names(write(tmp_path / "names.txt", "0::A\n1::B::C\n\n")) == {0: "A", 1: "B::C"}
    with pytest.raises(UserError, match="line 2 is 'B', not ID::NAME"):
        read_names(write(tmp_path / "names.txt", "0::A\nB\n"))
    with pytest.raises(UserError, match="no such file"):
        read_names(tmp_path / "none.txt")


def test_windows_lose_their_padding_and_short_ones_are_counted(tmp_path: Path) -> None:
    names = {0: "A", 1: "B", 2: "C", 3: "D"}
    lines = [
        {"seq": [0, 1, 2, 4], "len_seq": 3, "next": 3},
        {"seq": [0, 1, 4, 4], "len_seq": 2, "next": 3},
        {"seq": [4, 4, 4, 4], "len_seq": 1, "next": 0},
        {"seq": [0, 1, 9, 4], "len_seq": 3, "next": 3},
        {"seq": [0, 1, 2, 4], "len_seq": 3, "next": 7},
        {"seq": [0, 1, 2, 4]},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + "broken\n"
    cases, counts = read_windows(write(tmp_path / "train.jsonl", text), names)
    assert cases == [Case("train-0", ("A", "B", "C"), "D", seen=frozenset("ABCD"))]
    assert counts == {
        "cases read": 7,
        "windows with too short a history": 2,
        "windows with an item without title": 2,
        "unparsable windows": 2,
    }


def test_windows_need_names(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(UserError, match=r"need names: give the path of id2name\.txt"):
        prepare_published(PublishedSettings(train=train, validation=train, test=train))


def test_both_forms_together(tmp_path: Path) -> None:
    names = write(tmp_path / "id2name.txt", "".join(f"{n}::{c}\n" for n, c in enumerate("ABCDEFGH")))
    train = write(tmp_path / "train.jsonl", '{"seq": [0, 1, 2, 8], "len_seq": 3, "next": 3}\n')
    test = write(tmp_path / "test.json", [GOOD])
    settings = PublishedSettings(train=train, validation=test, test=test, names=names, candidates=4, negatives=2)
    prepared = prepare_published(settings)
    assert prepared.test[0]["candidates"] == ["D", "E", "F"]
    assert prepared.popularity == {"A": 1, "B": 1, "C": 1, "D": 1}
    assert prepared.catalogue == list("ABCDEFGH")
    assert {title[1:] for title in prepared.train[0]["rejected"]} < set("EFGH")
    assert prepared.train[0]["chosen"] == " D"
    assert "A; B; C" in prepared.train[0]["prompt"]


def test_lastfm_is_the_set_of_the_paper(real_data: Path) -> None:
    folder = real_data / "lastfm"
    settings = PublishedSettings(
        train=folder / "llara" / "train_data.jsonl",
        validation=folder / "lastfm-val.json",
        test=folder / "lastfm-test.json",
        names=folder / "llara" / "id2name.txt",
        training_rows=3000,
    )
    prepared = prepare_published(settings)
    counts = prepared.counts
    assert counts["train rows"] + counts["train rows left out"] == 47_872
    assert counts["train windows with too short a history"] == 50_800 - 47_872
    assert (len(prepared.validation), len(prepared.test)) == (2_767, 2_495)
    assert counts["test cases that cannot be won by substring"] == 3
    raw = json.loads((folder / "lastfm-test.json").read_text(encoding="utf-8"))
    for row, case in zip(prepared.test, raw, strict=True):
        assert row["candidates"] == case["itemList"]
        assert len(set(row["candidates"])) == 20
        assert row["candidates"].count(row["target"]) == 1
        assert not set(row["candidates"]) & set(row["history"])
    for row in prepared.train:
        assert not {title[1:] for title in row["rejected"]} & {*row["history"], row["target"]}
        assert 3 <= len(row["history"]) <= 10
