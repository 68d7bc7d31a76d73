from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from rankwise.errors import UserError
from rankwise.recommend import (
    InteractionSettings,
    Prepared,
    SyntheticSettings,
    prepare_interactions,
    write_rows,
    write_synthetic,
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> InteractionSettings:
    ratings, items = write_synthetic(tmp_path_factory.mktemp("log"), SyntheticSettings(users=40))
    return InteractionSettings(ratings=ratings, items=items)


def check_rows(prepared: Prepared, met: dict[str, set[str]], candidates: int, negatives: int) -> None:
    """What holds for every row of a prepared log."""
    held: dict[str, set[str]] = {}
    for row in prepared.validation + prepared.test:
        held.setdefault(row["user"], set()).add(row["target"])
        assert len(set(row["candidates"])) == len(row["candidates"]) == candidates
        assert set(row["candidates"]) & met[row["user"]] == {row["target"]}
    for row, known in [
        *((row, met[row["user"]] - held[row["user"]]) for row in prepared.train),
        *((row, met[row["user"]]) for row in prepared.validation + prepared.test),
    ]:
        rejected = {title.removeprefix(" ") for title in row["rejected"]}
        assert len(rejected) == len(row["rejected"]) == negatives
        assert not rejected & known
        assert row["chosen"] == " " + row["target"]
        assert 1 <= len(row["history"]) <= 10
        assert row["target"] not in row["history"]
        assert row["prompt"] == row["prompt"].rstrip()


def titles_by_user(settings: InteractionSettings) -> dict[str, set[str]]:
    """Read apart from the code under test."""
    assert settings.items is not None
    log, items = pl.read_csv(settings.ratings), pl.read_csv(settings.items)
    met: dict[str, set[str]] = {}
    for user, title in log.join(items, on="item").select("user", "title").iter_rows():
        met.setdefault(user, set()).add(title)
    return met


def test_training_rows_do_not_tell_what_is_held_out(small: InteractionSettings) -> None:
    """A user's test item is rejected in training rows as often as any title: were it never, its absence would tell."""
    prepared = prepare_interactions(replace(small, candidates=20, negatives=19))
    targets = {row["user"]: " " + row["target"] for row in prepared.test}
    shown = sum(targets[row["user"]] in row["rejected"] for row in prepared.train if row["user"] in targets)
    expected = len(prepared.train) * 19 / len(prepared.catalogue)
    assert 0.5 * expected < shown < 1.5 * expected


def test_rows_of_a_log(small: InteractionSettings) -> None:
    prepared = prepare_interactions(small)
    met = titles_by_user(small)
    check_rows(prepared, met, candidates=20, negatives=3)
    assert len(prepared.validation) == len(prepared.test) == 40
    assert len(prepared.train) == sum(len(titles) - 3 for titles in met.values())
    assert set(prepared.catalogue) == set().union(*met.values())
    assert set(prepared.train[0]) == {"user", "prompt", "chosen", "rejected", "target", "history", "seen"}
    assert prepared.counts["train rows"] == len(prepared.train)
    assert {user: set(titles) for user, titles in prepared.histories.iter_rows()} == met
    assert prepared.most_history == max(len(row["history"]) for row in prepared.test)


def test_popularity_counts_training_interactions_only(small: InteractionSettings) -> None:
    log = pl.read_csv(small.ratings).join(pl.read_csv(small.items), on="item", maintain_order="left")
    expected: Counter[str] = Counter()
    for _, rows in log.group_by("user"):
        expected.update(rows.sort("timestamp")["title"].to_list()[:-2])
    assert prepare_interactions(small).popularity == expected


def test_a_template_with_candidates_shows_all_of_them_and_the_negatives_are_among_them(
    small: InteractionSettings,
) -> None:
    prepared = prepare_interactions(replace(small, template="films-candidates", candidates=6, negatives=5))
    check_rows(prepared, titles_by_user(small), candidates=6, negatives=5)
    for row in prepared.train:
        listed = row["prompt"].split("choose from these: ")[1].split(". Of these")[0].split("; ")
        assert sorted(listed) == sorted(title[1:] for title in [row["chosen"], *row["rejected"]])


def test_limits_draw_by_seed_and_count_what_is_left_out(small: InteractionSettings) -> None:
    whole = prepare_interactions(small)
    part = prepare_interactions(replace(small, training_rows=50, evaluation_cases=7))
    assert (len(part.train), len(part.validation), len(part.test)) == (50, 7, 7)
    assert part.counts["train rows left out"] == len(whole.train) - 50
    assert part.counts["test rows left out"] == 33
    assert part.popularity == whole.popularity
    # a case is the same row whether or not others were left out
    assert all(row in whole.train for row in part.train)


def test_the_same_seed_gives_the_same_rows_and_another_does_not(small: InteractionSettings) -> None:
    one, other = prepare_interactions(small), prepare_interactions(small)
    for name in ("train", "validation", "test", "catalogue", "popularity", "counts"):
        assert getattr(one, name) == getattr(other, name)
    assert prepare_interactions(small).test != prepare_interactions(replace(small, seed=1)).test


def test_without_an_item_list_the_items_are_titles(tmp_path: Path) -> None:
    rows = [f"u{user},film {(user * 7 + step * 3) % 40},{step}\n" for user in range(5) for step in range(6)]
    path = tmp_path / "log.csv"
    path.write_text("user,item,time\n" + "".join(rows))
    prepared = prepare_interactions(InteractionSettings(ratings=path, candidates=4, negatives=2))
    assert prepared.test[0]["history"] == ["film 0", "film 3", "film 6", "film 9", "film 12"]
    assert prepared.test[0]["target"] == "film 15"


def test_what_is_dropped_is_counted_at_the_end(tmp_path: Path) -> None:
    log = ["a,1,1,5", "a,1,2,5", "a,2,3,5", "a,3,4,5", "a,4,5,5", "a,7,6,5", "a,5,7,1", "b,1,1,5", "c,x,y"]
    (tmp_path / "log.csv").write_text("user,item,time,rating\n" + "\n".join(log) + "\n")
    titles = [f"{number},film {number}" for number in range(1, 7)] + ["7,"]
    (tmp_path / "items.csv").write_text("item,title\n" + "\n".join(titles) + "\n")
    (tmp_path / "more.csv").write_text("")
    settings = InteractionSettings(
        ratings=tmp_path / "log.csv",
        items=tmp_path / "items.csv",
        minimum_rating=2.0,
        candidates=2,
        negatives=1,
    )
    with pytest.raises(UserError, match="catalogue of 4 titles is too small: user 'a'"):
        prepare_interactions(settings)
    (tmp_path / "log.csv").write_text("user,item,time,rating\n" + "\n".join([*log, "d,6,1,5", "d,5,2,5"]) + "\n")
    counts = prepare_interactions(settings).counts
    assert counts["unparsable rows"] == 1
    assert counts["duplicate interactions"] == 1
    assert counts["interactions below the rating"] == 1
    assert counts["interactions with an item without title"] == 1
    assert counts["items without title"] == 1
    assert counts["users with too short a history"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "flims"}, "unknown template 'flims'; did you mean 'films'"),
        ({"negatives": 20}, "negatives = 20: between 1 and 19"),
        ({"negatives": 0}, "negatives = 0"),
        ({"candidates": 1}, "candidates = 1"),
        ({"minimum_history": 50}, "no training row"),
        ({"training_rows": 0}, "a limit of 0 rows"),
        ({"candidates": 300, "negatives": 3}, "too small"),
    ],
)
def test_wrong_settings_are_refused(small: InteractionSettings, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare_interactions(replace(small, **changes))  # type: ignore[arg-type]


def test_written_rows_read_back_and_a_filled_folder_is_refused(small: InteractionSettings, tmp_path: Path) -> None:
    prepared = prepare_interactions(replace(small, training_rows=5))
    folder = write_rows(tmp_path / "rows", prepared)
    for name in ("train", "validation", "test"):
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        made = [{key: row[key] for key in row if key != "seen"} for row in getattr(prepared, name)]
        assert [json.loads(line) for line in lines] == made
    assert json.loads((folder / "counts.json").read_text()) == prepared.counts
    assert len(json.loads((folder / "catalogue.json").read_text())) == len(prepared.catalogue)
    with pytest.raises(UserError, match="not empty"):
        write_rows(folder, prepared)


def test_movielens_cases_hold_what_they_promise(real_data: Path) -> None:
    folder = real_data / "ml-latest-small"
    settings = InteractionSettings(
        ratings=folder / "ratings.csv", items=folder / "movies.csv", minimum_rating=3.0, training_rows=2000
    )
    prepared = prepare_interactions(settings)
    log = pl.read_csv(folder / "ratings.csv").filter(pl.col("rating") >= 3)
    titled = log.join(pl.read_csv(folder / "movies.csv"), on="movieId").select("userId", "title")
    met: dict[str, set[str]] = {}
    for user, title in titled.iter_rows():
        met.setdefault(str(user), set()).add(" ".join(title.split()))
    check_rows(prepared, met, candidates=20, negatives=3)
    assert len(prepared.test) == sum(len(titles) >= 3 for titles in met.values())
    assert prepared.counts["train rows left out"] > 70_000
    assert sum(prepared.popularity.values()) == sum(len(t) - 2 for t in met.values() if len(t) >= 3)
