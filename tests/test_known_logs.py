"""Small files in the form of published logs; all content is made up."""

from __future__ import annotations

import gzip
import json
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import polars as pl
import pytest

from rankwise.errors import UserError
from rankwise.recommend import Prepared, prepare_interactions
from rankwise.recommend.logs.known import KNOWN_LOGS, known_log
from rankwise.recommend.logs.reading import read_table
from rankwise.schema import InteractionData
from rankwise.tasks.files import check_files
from rankwise.tasks.load import interaction_settings

TITLES = ["Café, The (1990)", "Bar (1991)", "Zoé (1992)", 'A "Q" (1993)', "E (1994)", "F"]
PLAYS = [(user, item, 100 * user + 10 * item) for user in (1, 2) for item in range(1, 6)] + [(3, 6, 5)]


def prepared(folder: Path, form: str, **changes: Any) -> Prepared:
    data = InteractionData(
        kind="interactions", interactions=str(folder), form=form, candidates=2, negatives=1, **changes
    )
    check_files(data)
    return prepare_interactions(interaction_settings(data, seed=0))


def check(found: Prepared, titles: list[str]) -> None:
    """Both users chose the first five in this order."""
    assert {(row["user"], row["target"]) for row in found.test} == {("1", titles[4]), ("2", titles[4])}
    assert all(row["history"] == titles[:4] for row in found.test)
    assert found.counts["interactions read"] == 11
    assert found.counts["unparsable rows"] == 0


def test_movielens_100k(tmp_path: Path) -> None:
    (tmp_path / "u.data").write_text("".join(f"{user}\t{item}\t4\t{time}\n" for user, item, time in PLAYS))
    items = [f"{number}|{title}|01-Jan-1995||http://x|{'0|' * 18}1" for number, title in enumerate(TITLES, start=1)]
    (tmp_path / "u.item").write_bytes("\n".join(items).encode("latin-1"))
    check(prepared(tmp_path, "movielens-100k"), TITLES)


def test_a_compressed_list_in_latin_1(tmp_path: Path) -> None:
    (tmp_path / "u.data").write_text("".join(f"{user}\t{item}\t4\t{time}\n" for user, item, time in PLAYS))
    items = [f"{number}|{title}|01-Jan-1995||http://x|{'0|' * 18}1" for number, title in enumerate(TITLES, start=1)]
    (tmp_path / "u.item.gz").write_bytes(gzip.compress("\n".join(items).encode("latin-1")))
    check(prepared(tmp_path, "movielens-100k"), TITLES)


def test_movielens_1m(tmp_path: Path) -> None:
    (tmp_path / "ratings.dat").write_text("".join(f"{user}::{item}::4::{time}\n" for user, item, time in PLAYS))
    items = [f"{number}::{title}::Drama|Comedy\r" for number, title in enumerate(TITLES, start=1)]
    (tmp_path / "movies.dat").write_bytes("\n".join(items).encode("latin-1"))
    found = prepared(tmp_path, "movielens-1m", tidy_titles=True)
    check(found, ["The Café (1990)", *TITLES[1:]])


def test_movielens_latest(tmp_path: Path) -> None:
    log = pl.DataFrame(PLAYS, schema=["userId", "movieId", "timestamp"], orient="row")
    log.with_columns(rating=4.0).write_csv(tmp_path / "ratings.csv")
    pl.DataFrame({"movieId": range(1, 7), "title": TITLES, "genres": "x"}).write_csv(tmp_path / "movies.csv")
    check(prepared(tmp_path, "movielens", minimum_rating=3), TITLES)


def test_lastfm_1k(tmp_path: Path) -> None:
    name = "userid-timestamp-artid-artname-traid-traname.tsv"
    lines = [f"{user}\t2009-05-04T23:{time % 60:02d}:57Z\t\t{TITLES[item - 1]}\t\tSong" for user, item, time in
             [(user, item, 30 + item) for user, item, _ in PLAYS]]  # fmt: skip
    with gzip.open(tmp_path / f"{name}.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(lines))
    check(prepared(tmp_path, "lastfm-1k"), TITLES)


def test_lastfm_2k(tmp_path: Path) -> None:
    lines = [f"{user}\t{item}\t13\t{1238536800000 + time}" for user, item, time in PLAYS]
    (tmp_path / "user_taggedartists-timestamps.dat").write_text(
        "\n".join(["userID\tartistID\ttagID\ttimestamp", *lines])
    )
    items = [f"{number}\t{title}\thttp://x\thttp://y" for number, title in enumerate(TITLES, start=1)]
    (tmp_path / "artists.dat").write_text("\n".join(["id\tname\turl\tpictureURL", *items]), encoding="utf-8")
    check(prepared(tmp_path, "lastfm-2k"), TITLES)


def test_steam(tmp_path: Path) -> None:
    lines = [repr({"username": str(user), "hours": 1.5, "product_id": str(item), "date": f"2017-12-{10 + item}",
                   "text": "it's \"good\"\n", "early_access": False}) for user, item, _ in PLAYS]  # fmt: skip
    with gzip.open(tmp_path / "steam_reviews.json.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join([*lines, "{'username': open('x')}"]))
    games = [repr({"id": str(number), "title": title, "genres": ["Action"]}) for number, title in enumerate(TITLES, 1)]
    (tmp_path / "steam_games.json").write_text("\n".join(games), encoding="utf-8")
    found = prepared(tmp_path, "steam")
    assert found.counts["interactions read"] == 12
    assert found.broken["reason"].to_list() == ["no JSON object"]
    assert [row["history"] for row in found.test] == [TITLES[:4]] * 2


def test_goodreads(tmp_path: Path) -> None:
    read = [{"user_id": str(user), "book_id": str(item), "rating": 5, "is_read": True,
             "date_added": f"{date(2012, 3, 10 + item):%a %b %d} 15:50:44 -0700 2012"}
            for user, item, _ in PLAYS]  # fmt: skip
    lines = [json.dumps(one) for one in read]
    (tmp_path / "goodreads_interactions_poetry.json").write_text("\n".join(lines))
    books = [json.dumps({"book_id": str(number), "title": title, "authors": [{"author_id": "1"}]})
             for number, title in enumerate(TITLES, start=1)]  # fmt: skip
    with gzip.open(tmp_path / "goodreads_books_poetry.json.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(books))
    check(prepared(tmp_path, "goodreads", minimum_rating=3), TITLES)


def test_a_missing_file_and_an_unknown_form_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown form of a log 'movielens-2m'; did you mean 'movielens-1m'"):
        known_log("movielens-2m", tmp_path)
    (tmp_path / "ratings.dat").touch()
    with pytest.raises(UserError, match=r"form movielens-1m has one file movies\.dat; found: no such file"):
        known_log("movielens-1m", tmp_path)
    for name in ("goodreads_books_a.json", "goodreads_books_b.json.gz"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"found: goodreads_books_a\.json, goodreads_books_b\.json\.gz"):
        known_log("goodreads", tmp_path)


def test_the_recipe_names_every_form() -> None:
    said = InteractionData.model_fields["form"].description or ""
    assert all(name in said for name in KNOWN_LOGS)


@pytest.mark.parametrize("name", ["log.arrow", "log.feather"])
def test_arrow_files_are_read(tmp_path: Path, name: str) -> None:
    log = pl.DataFrame({"user": [1, 1, 1, 1], "item": ["P", "Q", "R", "S"], "time": [1, 2, 3, 4]})
    if name.endswith("feather"):
        log.write_ipc(tmp_path / name)
    else:
        log.write_ipc_stream(tmp_path / name)
    assert read_table(tmp_path / name)[0].rows() == [(str(user), item, str(time)) for user, item, time in log.rows()]


def test_a_dataset_on_disk_is_read(tmp_path: Path) -> None:
    rows = {"user": ["a"] * 4, "item": ["P", "Q", "R", "S"], "time": [1, 2, 3, 4]}
    table = datasets.Dataset.from_dict(rows)
    table.save_to_disk(str(tmp_path / "log"))
    found, _ = read_table(tmp_path / "log")
    assert found["item"].to_list() == rows["item"]
    table.shuffle(seed=0).save_to_disk(str(tmp_path / "shuffled"))
    assert sorted(read_table(tmp_path / "shuffled")[0]["item"]) == rows["item"]
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(UserError, match="a dataset with the parts test, train: give the folder of one of them"):
        read_table(tmp_path / "both")
