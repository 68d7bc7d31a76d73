"""A log in parts, as one; and what is left out of it."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import small_runs
from rankwise.cli import main
from rankwise.errors import UserError
from rankwise.recommend import (
    InteractionSettings,
    SyntheticSettings,
    load_template,
    prepare_interactions,
    write_interactions,
    write_rows,
    write_synthetic,
)
from rankwise.recommend.logs.parts import Workshop, user_ranges
from rankwise.recommend.logs.runs import read_runs
from rankwise.recommend.splits import moment
from rankwise.schema import InteractionData
from small_logs import written


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> InteractionSettings:
    ratings, items = write_synthetic(tmp_path_factory.mktemp("log"), SyntheticSettings(users=40))
    return InteractionSettings(ratings=ratings, items=items)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize(
    "changes", [{}, {"kind": "time"}, {"kind": "users"}, {"core": 4}, {"session_gap": 86_400.0 * 30}]
)
def test_a_log_in_many_parts_gives_the_same_rows(
    small: InteractionSettings, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = replace(small, training_rows=100, **changes)
    write_rows(tmp_path / "memory", prepare_interactions(whole))
    write_interactions(tmp_path / "whole", whole)
    monkeypatch.setattr("rankwise.recommend.logs.reading.files.ROWS", 50)
    runs = read_runs(replace(whole, rows_in_memory=150), Workshop(tmp_path))
    assert len(runs.parts) > 2
    assert len(user_ranges(runs.parts, runs.users, 150)) > 2
    shutil.rmtree(tmp_path / "runs")
    write_interactions(tmp_path / "parts", replace(whole, rows_in_memory=150))
    assert contents(tmp_path / "memory") == contents(tmp_path / "whole") == contents(tmp_path / "parts")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_files_of_a_folder_are_one_log(small: InteractionSettings, tmp_path: Path) -> None:
    log = pl.read_csv(small.ratings)
    folder = tmp_path / "log"
    folder.mkdir()
    log[:300].write_csv(folder / "a.csv")
    log[300:700].write_parquet(folder / "b.parquet")
    log[700:].write_ndjson(folder / "c.jsonl")
    (folder / "_SUCCESS").touch()
    one, many = prepare_interactions(small), prepare_interactions(replace(small, ratings=folder))
    assert one.train == many.train
    assert one.test == many.test
    assert one.counts == many.counts


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.sampled_from("abcdefg"), st.sampled_from("123456789"), st.integers(0, 30)), min_size=1, max_size=40
    ),
    st.sampled_from([4, 1000]),
    st.integers(1, 4),
)
def test_parts_and_core_are_as_counted_by_hand(
    tmp_path: Path, rows: list[tuple[str, str, int]], most: int, core: int
) -> None:
    """An independent version: plain loops over the rows in memory."""
    kept: dict[tuple[str, str], int] = {}
    for place, (user, item, _) in sorted(enumerate(rows), key=lambda numbered: (numbered[1][2], numbered[0])):
        kept.setdefault((user, item), place)
    while True:
        users, items = [user for user, _ in kept], [item for _, item in kept]
        fewer = {pair: place for pair, place in kept.items()
                 if users.count(pair[0]) >= core and items.count(pair[1]) >= core}  # fmt: skip
        if len(fewer) == len(kept):
            break
        kept = fewer
    histories: dict[str, list[str]] = {}
    for (user, item), _ in sorted(kept.items(), key=lambda pair: (rows[pair[1]][2], pair[1])):
        histories.setdefault(user, []).append(item)
    expected = {user: items for user, items in histories.items() if len(items) >= 3}
    asked = InteractionSettings(
        ratings=written(tmp_path / "log.csv", rows), core=core, rows_in_memory=most, candidates=2, negatives=1
    )
    catalogue = {item for _, item in kept}
    trained = any(len(items) > 3 for items in expected.values())
    if not trained or any(len(catalogue - set(items)) < 1 for items in expected.values()):
        with pytest.raises(UserError, match=r"core|no training row|interactions or more|too small"):
            prepare_interactions(asked)
        return
    prepared = prepare_interactions(asked)
    assert set(prepared.catalogue) == catalogue
    assert {row["user"]: [*row["history"], row["target"]] for row in prepared.test} == {
        user: items[-11:] for user, items in expected.items()
    }
    assert len(prepared.train) == sum(len(items) - 3 for items in expected.values())


def test_broken_rows_are_used_around_and_listed(tmp_path: Path) -> None:
    """One row in a hundred is broken, each in a different way."""
    generator = random.Random(0)
    lines = [f"u{number % 20},i{generator.randrange(300)},{number}" for number in range(1000)]
    broken = {7: "u1,i3", 113: "u2,,5", 222: "u3,i3,soon", 333: ",i4,7", 444: "u5,i5,8,9", 555: "u6,i6,inf"}
    lines = [broken.get(number, line) for number, line in enumerate(lines, start=1)]
    (tmp_path / "log.csv").write_text("\n".join(["user,item,time", *lines]) + "\n")
    asked = InteractionSettings(ratings=tmp_path / "log.csv", rows_in_memory=100)
    found = write_interactions(tmp_path / "rows", asked)
    assert found.counts["interactions read"] == 1000
    assert found.counts["unparsable rows"] == len(broken)
    listed = [json.loads(line) for line in (tmp_path / "rows" / "broken_rows.jsonl").read_text().splitlines()]
    assert [(one["row"], one["reason"]) for one in listed] == [
        (7, "no valid time"),
        (113, "no valid item"),
        (222, "no valid time"),
        (333, "no valid user"),
        (444, "more fields than columns"),
        (555, "no valid time"),
    ]
    assert listed[2] == {"file": "log.csv", "row": 222, "reason": "no valid time", "content": '["u3", "i3", "soon"]'}


def test_times_in_mixed_units_are_refused_and_a_few_strays_are_left_out(tmp_path: Path) -> None:
    seconds = [(f"u{number % 30}", f"i{number}", 1_600_000_000 + number) for number in range(1000)]
    stray = [("u1", f"x{number}", 1_600_000_000_000 + number) for number in range(9)]
    few = written(tmp_path / "few.csv", seconds + stray)
    asked = InteractionSettings(ratings=few, candidates=2, negatives=1)
    prepared = prepare_interactions(asked)
    assert prepared.counts["interactions with a time in another unit"] == 9
    assert not any("x" in title for title in prepared.catalogue)
    mixed = written(tmp_path / "many.csv", seconds + stray + [("u2", "y", 1_600_000_000_000_000)] * 3)
    with pytest.raises(UserError, match=r"mixed units \(1000 in seconds, 9 in milliseconds, 3 in microseconds, by"):
        prepare_interactions(replace(asked, ratings=mixed))


def test_milliseconds_are_told_from_seconds(tmp_path: Path) -> None:
    rows = [("a", item, 1_600_000_000_000 + 1000 * time) for time, item in enumerate("PQRST")]
    others = [("b", "U", 1_600_000_000_000), ("b", "V", 1_600_000_001_000)]
    asked = InteractionSettings(
        ratings=written(tmp_path / "log.csv", [*rows, *others]), kind="time", minimum_interactions=2,
        validation_from=1_600_000_003, test_from="2020-09-13T12:26:44Z", candidates=2, negatives=1,
    )  # fmt: skip
    prepared = prepare_interactions(asked)
    assert [row["target"] for row in prepared.validation + prepared.test] == ["S", "T"]


def test_a_log_without_a_known_item_is_refused(small: InteractionSettings, tmp_path: Path) -> None:
    items = written(tmp_path / "items.csv", [("none", "A")], "item title")
    with pytest.raises(UserError, match="no item of the log is in the item list; check the item columns"):
        prepare_interactions(replace(small, items=items))


def test_a_folder_may_have_files_without_rows_or_without_a_whole_one(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    rows = [("a", item, time) for time, item in enumerate("PQRST")] + [("b", "U", 1)]
    written(folder / "1.csv", rows)
    (folder / "0.csv").write_text("user,item,time\n")
    (folder / "2.csv").write_text("user,item,time\nbroken,row\n")
    (folder / "3.csv").touch()
    (folder / "4.jsonl").write_text("no object\n")
    asked = InteractionSettings(ratings=folder, candidates=2, negatives=1)
    prepared = prepare_interactions(asked)
    assert prepared.counts["interactions read"] == 8
    assert prepared.counts["unparsable rows"] == 2
    assert prepared.broken["file"].to_list() == ["2.csv", "4.jsonl"]
    (folder / "1.csv").unlink()
    with pytest.raises(UserError, match="all 2 rows are unparsable"):
        prepare_interactions(asked)
    for name in ("2.csv", "4.jsonl"):
        (folder / name).unlink()
    with pytest.raises(UserError, match="it is empty but for its header"):
        prepare_interactions(asked)


def test_the_documentation_is_a_recipe(tmp_path: Path) -> None:
    """Dates that YAML reads as such included."""
    page = (Path(__file__).parents[1] / "docs" / "recommenders.md").read_text(encoding="utf-8")
    values = yaml.safe_load(page.split("```yaml")[1].split("```")[0])
    data = InteractionData(**values["data"])
    assert (data.validation_from, data.test_from) == ("2024-01-01", "2024-03-01")
    assert moment(data.test_from or 0) > moment(data.validation_from or 0)
    (tmp_path / "rated.yaml").write_text(page.split("```yaml")[2].split("```")[0], encoding="utf-8")
    assert load_template(tmp_path / "rated.yaml").attributes == ("genres",)


def test_an_open_quote_is_told_with_its_remedy(tmp_path: Path) -> None:
    lines = [f"u{number % 20},i{number}{chr(34) if number == 300 else ''},{number}" for number in range(1000)]
    lines[300] = 'u1,"i300,300'
    (tmp_path / "log.csv").write_text("\n".join(["user,item,time", *lines]) + "\n")
    asked = InteractionSettings(ratings=tmp_path / "log.csv")
    with pytest.raises(UserError, match="where they are plain characters set quoting: false"):
        prepare_interactions(asked)
    prepared = prepare_interactions(replace(asked, quoting=False))
    assert prepared.counts["interactions read"] == 1000
    assert '"i300' in prepared.catalogue


def test_what_the_core_leaves_out_is_no_item(tmp_path: Path) -> None:
    rows = [(user, item, time) for user in "abc" for time, item in enumerate("PQRS")] + [("a", "rare", 9)]
    asked = InteractionSettings(
        ratings=written(tmp_path / "log.csv", [*rows, ("d", "P", 1), ("d", "T", 2)]), core=2, candidates=2, negatives=1
    )
    written(tmp_path / "log.csv", [*rows, *(("d", item, 5) for item in "PQT"), *(("e", item, 5) for item in "PQT")])
    prepared = prepare_interactions(asked)
    assert "rare" not in prepared.catalogue
    assert set(prepared.items["title"]) == set(prepared.catalogue)


def test_folders_and_damaged_files_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "a[1]"
    (folder / "inner").mkdir(parents=True)
    with pytest.raises(UserError, match="holds the folder inner"):
        prepare_interactions(InteractionSettings(ratings=folder))
    data = gzip.compress(b"user,item,time\n" + b"a,b,1\n" * 1000)
    (tmp_path / "cut.csv.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"cut\.csv\.gz: not readable as CSV"):
        prepare_interactions(InteractionSettings(ratings=tmp_path / "cut.csv.gz"))
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "\n{}\n")
    with pytest.raises(UserError, match="all 2 rows are unparsable"):
        prepare_interactions(InteractionSettings(ratings=tmp_path / "deep.jsonl"))


def test_a_folder_with_brackets_is_a_folder(small: InteractionSettings, tmp_path: Path) -> None:
    found = write_interactions(tmp_path / "a[1]" / "rows", replace(small, rows_in_memory=100))
    assert (found.folder / "train.jsonl").is_file()


def test_a_run_lists_broken_rows_and_tells_what_leaks(
    small: InteractionSettings, tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = small_runs.values("interactions", tmp_path, model_folder)
    with Path(values["data"]["interactions"]).open("a") as file:
        file.write("broken,row\n")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    said = capsys.readouterr().out
    assert "unparsable rows: 1" in said
    assert "test targets of users who train too" in said
    [listed] = (Path(values["output"]) / "store" / "broken_rows.jsonl").read_text().splitlines()
    assert json.loads(listed)["content"] == '["broken", "row"]'
