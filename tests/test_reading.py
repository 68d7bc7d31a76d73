from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.errors import UserError
from rankwise.recommend.logs.items import read_items
from rankwise.recommend.logs.reading import Form, find_column, find_optional_column, read_batches, read_table, text
from rankwise.recommend.logs.reading.forms import SUFFIXES
from rankwise.recommend.logs.reading.text import LONGEST, zstd


def test_csv_is_text_with_quotes_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes('\ufeffid,title\r\n01,"Heat, ""The"""\r\n2,"two\nlines"\r\n3,a,b\r\n4\r\n'.encode())
    table, broken = read_table(path)
    assert table.rows() == [("01", 'Heat, "The"'), ("2", "two\nlines"), ("4", None)]
    assert broken.rows() == [(3, "more fields than columns", '["3", "a", "b"]')]


def test_json_lines_may_hold_line_separators_and_other_keys(tmp_path: Path) -> None:
    rows = [{"id": 1, "title": "a\u2028b\x85c"}, {"id": 2.0, "year": 1999}, {"id": [1], "title": True}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    table, broken = read_table(path)
    assert table.rows() == [("1", "a\u2028b\x85c", None), ("2", None, "1999"), (None, None, None)]
    assert broken.is_empty()


def test_parquet_columns_of_every_kind_become_text(tmp_path: Path) -> None:
    moment = datetime(2020, 1, 1, 12, tzinfo=UTC)
    table = pl.DataFrame(
        {
            "float_id": [1.0, None],
            "share": [0.5, float("inf")],
            "moment": pl.Series([moment, None], dtype=pl.Datetime("ns", "UTC")),
            "list": [["a"], ["b"]],
            "kind": pl.Series(["x", None], dtype=pl.Categorical),
        }
    )
    table.write_parquet(tmp_path / "a.parquet")
    first, second = read_table(tmp_path / "a.parquet")[0].rows()
    assert first[:2] == ("1", "0.5")
    assert datetime.fromisoformat(first[2]) == moment.replace(tzinfo=None)
    assert first[3:] == ("a", "x")
    assert second == (None, "inf", None, "b", None)


def test_common_names_are_found_whatever_their_spelling(tmp_path: Path) -> None:
    columns = ["User ID", "movieId", "rating"]
    assert find_column(tmp_path, columns, "user", None, ("user", "user_id")) == "User ID"
    assert find_column(tmp_path, columns, "item", None, ("item", "movie_id")) == "movieId"
    assert find_column(tmp_path, columns, "item", "rating", ("movie_id",)) == "rating"
    assert find_optional_column(tmp_path, columns, "time", None, ("time",)) is None
    with pytest.raises(UserError, match="no column found for the time, name it; known: User ID, movieId"):
        find_column(tmp_path, columns, "time", None, ("time",))
    with pytest.raises(UserError, match="no column 'ratings' for the rating; did you mean 'rating'"):
        find_optional_column(tmp_path, columns, "rating", "ratings", ())


def test_no_field_is_lost_beyond_the_header(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,title\n1,a\n2,b,,c\n3,d,\n")
    table, broken = read_table(path)
    assert table.rows() == [("1", "a"), ("3", "d")]  # nothing stands after the last comma
    assert broken.rows() == [(2, "more fields than columns", '["2", "b", null, "c"]')]


def test_quotes_are_plain_characters_in_the_header_too(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('id\t"title"\n1\t12" disk\n')
    table, _ = read_table(path, quoting=False)
    assert table.to_dicts() == [{"id": "1", '"title"': '12" disk'}]


@pytest.mark.parametrize("name", ["log.csv.gz", "log.csv", "log.jsonl.gz", "log.csv.zst"])
def test_a_line_without_end_is_refused(tmp_path: Path, name: str) -> None:
    """A small compressed file can hold a line that fills the memory."""
    opened = {".gz": gzip.open, ".zst": zstd.open}.get(Path(name).suffix, open)
    with opened(tmp_path / name, "wb") as file:
        file.write(b"user,item,time\n" + b"0" * (LONGEST + 1))
    with pytest.raises(UserError, match=r"a line has more than 16777216 bytes"):
        list(read_batches(tmp_path / name))


@pytest.mark.parametrize("name", ["log.csv.gz", "log.csv", "log.tsv.zst"])
@pytest.mark.parametrize("row", [b"a,b,3\n", b'"a","b",3\n'])
def test_an_open_quote_does_not_take_the_rest_of_a_file_as_one_row(tmp_path: Path, name: str, row: bytes) -> None:
    """As polars would, with ten times its bytes in memory."""
    opened = {".gz": gzip.open, ".zst": zstd.open}.get(Path(name).suffix, open)
    with opened(tmp_path / name, "wb") as file:
        file.write(b'user,item,time\na,"b,3\n' + row * (LONGEST // 5))
    with pytest.raises(
        UserError, match=r"more than 16777216 bytes.*where they are plain characters set quoting: false"
    ):
        list(read_batches(tmp_path / name))
    assert sum(batch.table.height for batch in read_batches(tmp_path / name, quoting=False)) == LONGEST // 5 + 1


def test_rows_within_quotes_are_read_as_long_as_they_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long for the check as for polars, wherever what is looked at in one go ends."""
    row = 'a,"two ""lines""\nand\nmore",3\n'
    (tmp_path / "log.csv").write_text("user,item,time\n" + row * 1000)
    monkeypatch.setattr(text, "LONGEST", len(row))
    monkeypatch.setattr(text, "_CHUNK", 7)
    table, _ = read_table(tmp_path / "log.csv")
    assert table["item"].to_list() == ['two "lines"\nand\nmore'] * 1000
    monkeypatch.setattr(text, "LONGEST", len(row) - 8)
    with pytest.raises(UserError, match=r"a line has more than \d+ bytes"):
        read_table(tmp_path / "log.csv")


@given(content=st.text('ab",\n', max_size=60), longest=st.integers(1, 12), chunk=st.integers(1, 9))
def test_a_row_is_as_long_as_its_quotes_say(content: str, longest: int, chunk: int) -> None:
    """Rows are split here one character at a time: a line feed after an even number of quotes ends one."""
    rows, quotes = [0], 0
    for character in content:
        quotes += character == '"'
        rows = [*rows, 0] if character == "\n" and quotes % 2 == 0 else [*rows[:-1], rows[-1] + 1]
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder) / "log.csv"
        path.write_text(content)
        patch.setattr(text, "LONGEST", longest)
        patch.setattr(text, "_CHUNK", chunk)
        try:
            text.check_lines(path, SUFFIXES[".csv"])
        except UserError:
            assert max(rows) > longest
        else:
            assert max(rows) <= longest + chunk


@pytest.mark.parametrize("cut", [5, 30, -4])
@pytest.mark.parametrize("pack", [gzip.compress, zstd.compress])
def test_a_broken_compressed_file_is_refused(tmp_path: Path, cut: int, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / ("log.csv.gz" if pack is gzip.compress else "log.csv.zst")
    path.write_bytes(pack(b"user,item,time\n" + bytes(range(256)) * 9)[:cut])
    with pytest.raises(UserError, match=rf"{path.name}: not readable as CSV"):
        list(read_batches(path))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "not what the datasets library writes: save the dataset again"),
        ({"_data_files": [{"name": "a.arrow"}]}, "not what the datasets library writes"),
        ({"_data_files": [{"filename": "a.arrow"}]}, "a dataset without its file a.arrow: save it again"),
        ({"_data_files": [], "_indices_files": [{}]}, r"a selection of its rows: save its flatten_indices\(\) to disk"),
    ],
)
def test_a_saved_dataset_that_cannot_be_read_is_told(tmp_path: Path, state: object, message: str) -> None:
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=message):
        list(read_batches(tmp_path))


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "..", "", 1, "a" * 300])
def test_a_saved_dataset_stays_within_its_folder(tmp_path: Path, name: object) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(UserError, match=r"state\.json: .* is no file of this folder"):
        list(read_batches(tmp_path))


def test_a_literal_with_half_a_character_is_a_broken_row(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{'user': 'a'}\n{'u\\ud800ser': 'b'}\n")
    table, broken = read_table(tmp_path / "a.json", Form(literals=True))
    assert (table.to_dicts(), broken["row"].to_list()) == ([{"user": "a"}], [2])


def test_a_long_name_of_a_column_is_cut_in_the_message(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text(f"item,{'title' * 2000},{'title' * 2000}\n1,2,3\n")
    with pytest.raises(UserError) as caught:
        read_items(tmp_path / "items.csv")
    assert len(str(caught.value)) < 400


def test_names_of_columns_stay_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text('"a\nb",c\n1,2\n')
    with pytest.raises(UserError, match="no column found for the item, name it; known: a b, c"):
        read_items(tmp_path / "items.csv")
