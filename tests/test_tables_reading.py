from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from rankwise.errors import UserError
from rankwise.tasks.delimited import BROKEN_QUOTES, EXTRA_FIELDS
from rankwise.tasks.tables import as_text, read_rows, require_columns

ROWS = [{"name": "Ana", "note": "a, b"}, {"name": "Bo", "note": 'says "no"'}]
STS = ["genre", "file", "year", "id", "score", "sentence1", "sentence2"]


def written(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize("name", ["t.json", "t.jsonl", "t.ndjson", "t.csv", "t.tsv", "t.parquet", "T.CSV"])
def test_the_same_rows_come_out_of_every_format(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        pl.DataFrame(ROWS).write_parquet(path)
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif suffix in {".jsonl", ".ndjson"}:
        path.write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    else:
        pl.DataFrame(ROWS).write_csv(path, separator="\t" if suffix == ".tsv" else ",")
    assert read_rows(path) == (ROWS, {})


@pytest.mark.parametrize(("name", "text"), [("t.csv", "a,b\r\n1,2\r\n"), ("t.jsonl", '{"a": "1", "b": "2"}\r\n')])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_byte_order_mark_and_windows_line_ends(tmp_path: Path, name: str, text: str, mark: bytes) -> None:
    assert read_rows(written(tmp_path, name, mark + text.encode())) == ([{"a": "1", "b": "2"}], {})


def test_broken_lines_are_dropped_and_counted(tmp_path: Path) -> None:
    lines = '{"a": 1}\nnot json\n[1]\n\n{"a": 2\n{}\n{"a": 3}\n' + "[" * 100_000 + "\n"
    rows, counts = read_rows(written(tmp_path, "t.jsonl", lines))
    assert rows == [{"a": 1}, {"a": 3}]
    assert counts == {"unparsable rows": 5}


@pytest.mark.parametrize("indent", [None, 2])
def test_one_object_is_one_row(tmp_path: Path, indent: int | None) -> None:
    assert read_rows(written(tmp_path, "t.json", json.dumps(ROWS[0], indent=indent) + "\n")) == (ROWS[:1], {})


def test_json_lines_after_a_broken_one_are_read(tmp_path: Path) -> None:
    assert read_rows(written(tmp_path, "t.json", '{"a"\n{"a": 1}\n')) == ([{"a": 1}], {"unparsable rows": 1})


def test_elements_that_are_no_objects_are_counted(tmp_path: Path) -> None:
    assert read_rows(written(tmp_path, "t.json", '[{"a": 1}, 2, "x", null]')) == (
        [{"a": 1}],
        {"unparsable rows": 3},
    )


def test_half_of_an_escaped_character_is_counted_and_a_whole_one_is_kept(tmp_path: Path) -> None:
    lines = '{"a": "\\ud83d\\ude00"}\n{"a": ["\\uD83D"]}\n'
    assert read_rows(written(tmp_path, "t.jsonl", lines)) == ([{"a": "\U0001f600"}], {"unparsable rows": 1})


def test_a_json_string_may_hold_a_line_separator(tmp_path: Path) -> None:
    assert read_rows(written(tmp_path, "t.jsonl", '{"a": "x\u2028y\x85z"}\n')) == (
        [{"a": "x\u2028y\x85z"}],
        {},
    )


def test_json_lines_under_the_name_json(tmp_path: Path) -> None:
    assert read_rows(written(tmp_path, "t.json", '{"a": 1}\n{"a": 2}\n')) == ([{"a": 1}, {"a": 2}], {})


@pytest.mark.parametrize("quoting", [True, False])
def test_short_lines_are_dropped_and_long_ones_cut_with_counts(tmp_path: Path, quoting: bool) -> None:
    path = written(tmp_path, "t.csv", "a,b\n1,2\n3\n\n4,5,6\n7,\n")
    rows, counts = read_rows(path, quoting=quoting)
    assert rows == [{"a": "1", "b": "2"}, {"a": "4", "b": "5"}, {"a": "7", "b": ""}]
    assert counts == {"unparsable rows": 1, EXTRA_FIELDS: 1}


def test_quotes_as_plain_characters(tmp_path: Path) -> None:
    path = written(tmp_path, "t.tsv", 'a\tb\n"x\ty"\n"\t"\n')
    assert read_rows(path, quoting=False)[0] == [{"a": '"x', "b": 'y"'}, {"a": '"', "b": '"'}]


def test_quoted_field_over_several_lines(tmp_path: Path) -> None:
    assert read_rows(written(tmp_path, "t.csv", 'a,b\n"x\ny","z"\n'))[0] == [{"a": "x\ny", "b": "z"}]


def test_every_line_that_a_broken_quote_swallows_is_counted(tmp_path: Path) -> None:
    path = written(tmp_path, "t.csv", 'a,b\n1,"x\n2,y\n3,"z\n4,w\n')
    assert read_rows(path) == ([{"a": "4", "b": "w"}], {BROKEN_QUOTES: 3})


def test_a_quote_never_closed_names_its_line_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line 3 is never closed; .* quoting: false"):
        read_rows(written(tmp_path, "t.csv", 'a,b\n1,2\n3,"x\n4,y\n5,z\n'))


def test_without_a_header_and_with_a_delimiter_of_two_characters(tmp_path: Path) -> None:
    path = written(tmp_path, "movies.dat.txt", "1::Up\n2::Ran\n")
    rows, _ = read_rows(path, delimiter="::", header=False, columns=["id", "title"], quoting=False)
    assert rows == [{"id": "1", "title": "Up"}, {"id": "2", "title": "Ran"}]


def test_a_huge_field_is_read_and_the_limit_put_back(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    huge = "x" * (limit + 10)
    assert read_rows(written(tmp_path, "t.csv", f"a,b\n1,{huge}\n"))[0][0]["b"] == huge
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.xlsx", "a", r"unsupported file type '.xlsx'; accepted: .json, .jsonl"),
        ("t.txt", "a", r"only where its delimiter is given"),
        ("t", "a", r"unsupported file type ''"),
        ("t.csv", "", r"is empty"),
        ("t.csv", "\n\n", r"no usable row"),
        ("t.csv", "a,b\n", r"no usable row"),
        ("t.csv", "a,b\n1\n2\n", r"no usable row: 2 unparsable rows"),
        ("t.csv", "a,a\n1,2\n", r"column 'a' is named twice"),
        ("t.csv", b"a,b\n\xff\xfe,2\n", r"not UTF-8 \(byte 4\)"),
        ("t.jsonl", "nonsense\n", r"no usable row: 1 unparsable"),
        ("t.jsonl", "\n \n", r"no usable row"),
        ("t.json", "[1, 2", r"not valid JSON"),
        ("t.json", "[]", r"no usable row"),
        ("t.parquet", "nonsense", r"not readable as Parquet"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_rows(written(tmp_path, name, content))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file: .*absent\.csv"):
        read_rows(tmp_path / "absent.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        read_rows(tmp_path / "folder.csv")


def test_parquet_without_rows(tmp_path: Path) -> None:
    pl.DataFrame({"a": []}).write_parquet(tmp_path / "t.parquet")
    with pytest.raises(UserError, match="no usable row"):
        read_rows(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"header": False}, "header: false"),
        ({"columns": ["a"]}, "header: false"),
        ({"delimiter": "::"}, "one character"),
        ({"delimiter": '"'}, "one character"),
    ],
)
def test_options_that_contradict_each_other(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_rows(written(tmp_path, "t.csv", "a,b\n1,2\n"), **options)


def test_options_of_delimited_files_are_refused_elsewhere(tmp_path: Path) -> None:
    for options in ({"delimiter": ","}, {"header": False}, {"columns": ["a"]}, {"quoting": False}):
        with pytest.raises(UserError, match=r"are for \.csv and \.tsv"):
            read_rows(written(tmp_path, "t.jsonl", '{"a": 1}'), **options)


def test_a_missing_column_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match="no column 'sentense'; did you mean 'sentence'"):
        require_columns(Path("t.csv"), [{"sentence": "x"}, {"label": "y"}], ["label", "sentense"])


@pytest.mark.parametrize(
    ("value", "text"),
    [("x ", "x "), (" \n", ""), (3, "3"), (0, "0"), (10**400, f"1{400 * '0'}"), (None, ""), ([1], ""), (math.nan, "")],
)
def test_cells_as_text(value: object, text: str) -> None:
    assert as_text(value) == text


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("RTE/train", 2490),
        ("RTE/dev", 277),
        ("MRPC/train", 3668),
        ("MRPC/dev", 408),
        ("SST-2/train", 67349),
        ("SST-2/dev", 872),
    ],
)
def test_real_tab_separated_files(data_folder: Path, name: str, rows: int) -> None:
    read, counts = read_rows(data_folder / "glue" / f"{name}.tsv", quoting=False)
    assert (len(read), counts) == (rows, {})
    assert not any(column.startswith("\ufeff") for column in read[0])


@pytest.mark.parametrize(("part", "rows", "longer"), [("train", 5749, 197), ("dev", 1500, 22), ("test", 1379, 284)])
def test_real_similarity_files(data_folder: Path, part: str, rows: int, longer: int) -> None:
    path = data_folder / "glue" / "STS-B" / f"sts-{part}.csv"
    read, counts = read_rows(path, delimiter="\t", header=False, columns=STS, quoting=False)
    assert (len(read), counts) == (rows, {EXTRA_FIELDS: longer})
    assert all(0 <= float(row["score"]) <= 5 for row in read)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("gsm8k/train.jsonl", 7473),
        ("gsm8k/test.jsonl", 1319),
        ("instruct/alpaca_subset.json", 2000),
        ("instruct/alpaca_eval.jsonl", 805),
        ("ml-latest-small/ratings.csv", 100_836),
        ("ml-latest-small/movies.csv", 9742),
        ("text/imdb-test-pos.parquet", 12_500),
    ],
)
def test_real_files(data_folder: Path, name: str, rows: int) -> None:
    read, counts = read_rows(data_folder / name)
    assert (len(read), counts) == (rows, {})
