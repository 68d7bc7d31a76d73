from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from rankwise.errors import UserError
from rankwise.recommend import (
    InteractionColumns,
    ItemColumns,
    attach_titles,
    read_interactions,
    read_items,
    tidy_title,
)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


ROWS = [("u1", "1", 4.0, 30), ("u1", "2", 2.5, 10), ("u2", "1", 5.0, 20)]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".ndjson", ".parquet"])
def test_every_format_gives_the_same_table(tmp_path: Path, suffix: str) -> None:
    table = pl.DataFrame(ROWS, schema=["userId", "movieId", "rating", "timestamp"], orient="row")
    path = tmp_path / f"log{suffix}"
    if suffix == ".parquet":
        # pandas makes ids floats where some are missing; they must still match the items' integers
        table.with_columns(pl.col("movieId").cast(pl.Float64)).write_parquet(path)
    elif suffix in (".csv", ".tsv"):
        table.write_csv(path, separator="," if suffix == ".csv" else "\t")
    else:
        table.with_columns(pl.col("movieId").cast(pl.Int64)).write_ndjson(path)
    log, counts = read_interactions(path, InteractionColumns(rating="rating"))
    assert log.columns == ["user", "item", "time", "rating"]
    assert log.rows() == [("u1", "1", 30.0, 4.0), ("u1", "2", 10.0, 2.5), ("u2", "1", 20.0, 5.0)]
    assert counts == {
        "interactions read": 3,
        "unparsable rows": 0,
        "interactions below the rating": 0,
        "interactions with a time in another unit": 0,
        "duplicate interactions": 0,
    }


def test_columns_of_any_name_are_mapped(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", "who,what,when,extra\nanna,x,5,1\n")
    log, _ = read_interactions(path, InteractionColumns(user="who", item="what", time="when"))
    assert log.rows() == [("anna", "x", 5.0)]


def test_iso_dates_and_numbers_become_seconds(tmp_path: Path) -> None:
    text = (
        "user,item,time\na,1,1970-01-02\na,2,1970-01-01T00:00:10Z\na,3,1970-01-01 01:00:00+01:00\n"
        "a,4,7.5\na,5,1970-01-01T00:00:01.5\n"
    )
    log, _ = read_interactions(write(tmp_path / "log.csv", text))
    assert log["time"].to_list() == [86400.0, 10.0, 0.0, 7.5, 1.5]


def test_parquet_datetimes_become_seconds(tmp_path: Path) -> None:
    times = pl.Series("time", [0, 86_400_000_000]).cast(pl.Datetime("us"))
    pl.DataFrame({"user": [1, 1], "item": [1, 2], "time": times}).write_parquet(tmp_path / "log.parquet")
    log, _ = read_interactions(tmp_path / "log.parquet")
    assert log.rows() == [("1", "1", 0.0), ("1", "2", 86400.0)]


def test_unparsable_rows_are_dropped_and_counted(tmp_path: Path) -> None:
    text = (
        "user,item,rating,time\n"
        "a,1,5,1\n"
        ",2,5,2\n"  # no user
        "a,,5,3\n"  # no item
        "a,4,good,4\n"  # no rating
        "a,5,5,yesterday\n"  # no time
        "a,6,5\n"  # too short
        "a,7,5,7,7\n"  # too long
        "a,8,nan,8\n"  # not a finite rating
        '"a ",9,1,9\n'
    )
    log, counts = read_interactions(write(tmp_path / "log.csv", text), InteractionColumns(rating="rating"))
    assert log["item"].to_list() == ["1", "9"]
    assert log["user"].to_list() == ["a", "a"]
    assert (counts["interactions read"], counts["unparsable rows"]) == (9, 7)


def test_a_rating_that_nobody_asked_for_costs_no_row(tmp_path: Path) -> None:
    text = "user,item,rating,time\na,1,,1\na,2,,2\n"
    log, counts = read_interactions(write(tmp_path / "log.csv", text))
    assert log.rows() == [("a", "1", 1.0), ("a", "2", 2.0)]
    assert counts["unparsable rows"] == 0


def test_a_header_that_names_a_column_twice(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'user' twice"):
        read_interactions(write(tmp_path / "log.csv", "user,user,item,time\na,b,1,1\n"))


def test_half_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    text = '{"user": "\\ud83d", "item": 1, "time": 1}\n{"user": "b", "item": 1, "time": 1}\n'
    log, counts = read_interactions(write(tmp_path / "log.jsonl", text))
    assert log["user"].to_list() == ["b"]
    assert counts["unparsable rows"] == 1


def test_unparsable_json_lines_are_dropped_and_counted(tmp_path: Path) -> None:
    text = '{"user": 1, "item": 2, "time": 3}\n\n{broken\n[1]\n{"user": null, "item": 2, "time": 3}\n'
    log, counts = read_interactions(write(tmp_path / "log.jsonl", text))
    assert log.rows() == [("1", "2", 3.0)]
    assert (counts["interactions read"], counts["unparsable rows"]) == (4, 3)


def test_the_earliest_duplicate_stays_and_ties_keep_the_first(tmp_path: Path) -> None:
    text = "user,item,rating,time\na,1,1,20\na,1,2,10\na,1,3,10\na,2,4,5\nb,1,5,1\n"
    log, counts = read_interactions(write(tmp_path / "log.csv", text), InteractionColumns(rating="rating"))
    assert log.rows() == [("a", "1", 10.0, 2.0), ("a", "2", 5.0, 4.0), ("b", "1", 1.0, 5.0)]
    assert counts["duplicate interactions"] == 2


def test_low_ratings_go_before_duplicates_are_judged(tmp_path: Path) -> None:
    text = "user,item,rating,time\na,1,1,1\na,1,5,2\na,2,3,3\n"
    log, counts = read_interactions(write(tmp_path / "log.csv", text), minimum_rating=3.0)
    assert log.rows() == [("a", "1", 2.0, 5.0), ("a", "2", 3.0, 3.0)]
    assert (counts["interactions below the rating"], counts["duplicate interactions"]) == (1, 0)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("log.csv", None, "no such file"),
        ("log.xlsx", "x", r"cannot read '\.xlsx'; accepted: \.csv"),
        ("log.csv", "", "empty"),
        ("log.csv", "user,item,time\n", "empty but for its header"),
        ("log.jsonl", "\n", "empty"),
        ("log.jsonl", "no\n[]\n", "all 2 rows are unparsable"),
        ("log.csv", "user,item,time\na,1,x\nb,2,y\n", "all 2 rows are unparsable"),
        ("log.csv", "user,item,moment\na,1,1\n", "no column found for the time.*user"),
        ("log.csv", 'user,item,time\na,"1,1\nb,2,2\n', "not readable as CSV"),
        ("log.parquet", "not parquet", "not readable as PARQUET"),
    ],
)
def test_a_file_that_cannot_serve_is_one_clear_error(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    path = tmp_path / name
    if text is not None:
        write(path, text)
    with pytest.raises(UserError, match=message):
        read_interactions(path)


def test_latin_letters_in_another_encoding_are_refused(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_bytes("user,item,time\ncaf\xe9,1,1\n".encode("latin-1"))
    with pytest.raises(UserError, match="UTF-8"):
        read_interactions(tmp_path / "log.csv")


def test_a_misnamed_column_names_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", "userId,movieId,timestamp\n1,1,1\n")
    with pytest.raises(UserError, match=r"no column 'usrId' for the user; did you mean 'userId'\?"):
        read_interactions(path, InteractionColumns(user="usrId"))


def test_a_minimum_rating_needs_ratings(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", "user,item,time\n1,1,1\n")
    with pytest.raises(UserError, match="no column found for the rating"):
        read_interactions(path, minimum_rating=3.0)
    rated = write(tmp_path / "rated.csv", "user,item,time,rating\n1,1,1,2\n")
    with pytest.raises(UserError, match="none of 1 interactions is rated 3\.0 or more"):
        read_interactions(rated, minimum_rating=3.0)


def test_items_without_title_twice_listed_and_of_one_title_are_counted(tmp_path: Path) -> None:
    text = (
        "id,title,genres\n1,  Emma   (1996) ,Drama\n2,,Drama\n3,Emma (1996),Romance\n1,Other,Drama\n"
        ",Nameless,Drama\n4,Heat, The,Crime\n5,Alien,\n"
    )
    items, counts = read_items(write(tmp_path / "items.csv", text), ItemColumns(extra=("genres",)))
    assert items.rows() == [
        ("1", "Emma (1996)", "Drama"),
        ("3", "Emma (1996)", "Romance"),
        ("5", "Alien", None),
    ]
    assert counts == {
        "items read": 7,
        "unparsable item rows": 2,
        "items without title": 1,
        "items listed twice": 1,
        "items that share another's title": 1,
    }


def test_items_without_any_title_or_column_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no row has both"):
        read_items(write(tmp_path / "a.csv", "item,title\n1,\n"))
    with pytest.raises(UserError, match="no column 'genre' for the extra column; did you mean 'genres'"):
        read_items(write(tmp_path / "b.csv", "item,title,genres\n1,A,B\n"), ItemColumns(extra=("genre",)))


def test_titles_are_attached_and_what_has_none_is_counted() -> None:
    log = pl.DataFrame({"user": ["a", "a", "a", "b"], "item": ["3", "1", "9", "1"], "time": [2.0, 1.0, 3.0, 4.0]})
    items = pl.DataFrame({"item": ["1", "3"], "title": ["Emma", "Emma"]})
    titled, counts = attach_titles(log, items)
    assert titled.select("user", "item", "title").rows() == [("a", "1", "Emma"), ("b", "1", "Emma")]
    assert counts == {
        "interactions with an item without title": 1,
        "interactions with another item of the same title": 1,
    }


@pytest.mark.parametrize(
    ("raw", "tidied"),
    [
        ("Matrix, The (1999)", "The Matrix (1999)"),
        ("Misérables, Les (1995)", "Les Misérables (1995)"),
        ("Avventura, L' (Adventure, The) (1960)", "L'Avventura (Adventure, The) (1960)"),
        (
            "Good, the Bad and the Ugly, The (Buono, il brutto, il cattivo, Il) (1966)",
            "The Good, the Bad and the Ugly (Buono, il brutto, il cattivo, Il) (1966)",
        ),
        ("Beautiful Mind, A", "A Beautiful Mind"),
        ("Good Morning, Vietnam (1987)", "Good Morning, Vietnam (1987)"),
        ("Me, Myself & Irene (2000)", "Me, Myself & Irene (2000)"),
    ],
)
def test_articles_go_to_the_front(raw: str, tidied: str) -> None:
    assert tidy_title(raw) == tidied


def test_movielens_is_read_whole(real_data: Path) -> None:
    folder = real_data / "ml-latest-small"
    log, counts = read_interactions(folder / "ratings.csv", minimum_rating=3.0)
    items, item_counts = read_items(folder / "movies.csv", tidy=True)
    plain = pl.read_csv(folder / "ratings.csv")
    assert counts["interactions read"] == plain.height == 100_836
    assert counts["unparsable rows"] == counts["duplicate interactions"] == 0
    assert log.height == plain.filter(pl.col("rating") >= 3).height
    assert items.height == 9_742
    assert item_counts["items that share another's title"] == 5
    assert not items["title"].str.contains(r", The \(").any()


def test_files_of_a_folder_may_name_their_columns_differently(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    write(folder / "a.csv", "userId,movieId,timestamp\n1,2,3\n")
    write(folder / "b.csv", "ts,user,item\n5,1,4\n")
    pl.DataFrame({"uid": [1], "item_id": [6], "date": [7], "other": [[1]]}).write_parquet(folder / "c.parquet")
    log, counts = read_interactions(folder)
    assert log.rows() == [("1", "2", 3.0), ("1", "4", 5.0), ("1", "6", 7.0)]
    assert counts["unparsable rows"] == 0
