from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from rankwise.errors import UserError
from rankwise.tasks.text import as_features, pack, read_documents


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "separator", "documents", "counts"),
    [
        ("\none\n\ntwo\n", None, ["one\n\ntwo"], {}),
        ("one\n<|endoftext|>\ntwo\n<|endoftext|>\n", "<|endoftext|>", ["one", "two"], {}),
        ("one<|endoftext|> \n<|endoftext|>two", "<|endoftext|>", ["one", "two"], {"empty documents": 1}),
        ("one\nmore\n\n \n\ntwo\n\n", "blank lines", ["one\nmore", "two"], {}),
        ("one\r\n\r\ntwo\r\n", "blank lines", ["one", "two"], {}),
        ("one\n\n  two\n", "\n", ["one", "  two"], {"empty documents": 1}),
    ],
)
def test_documents_of_a_text_file(
    tmp_path: Path, text: str, separator: str | None, documents: list[str], counts: dict[str, int]
) -> None:
    assert read_documents(written(tmp_path, "t.txt", text), separator=separator) == (documents, counts)


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert read_documents(written(tmp_path, "t.txt", "\ufeffone")) == (["one"], {})


def test_documents_of_a_column(tmp_path: Path) -> None:
    lines = [{"review": "good\n"}, {"review": " "}, {"review": None}, {"other": 1}, {"review": "bad"}]
    path = written(tmp_path, "t.jsonl", "\n".join(map(json.dumps, lines)) + "\nbroken\n")
    assert read_documents(path, column="review") == (
        ["good", "bad"],
        {"unparsable rows": 1, "empty documents": 3},
    )


def test_table_options_reach_the_table(tmp_path: Path) -> None:
    path = written(tmp_path, "t.txt", "1::one\n2::two\n")
    options: dict[str, Any] = {
        "delimiter": "::",
        "header": False,
        "columns": ["id", "text"],
        "quoting": False,
    }
    assert read_documents(path, **options) == (["one", "two"], {})


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("t.txt", "", {}, "is empty"),
        ("t.txt", " \n\n", {}, "holds no text"),
        ("t.txt", "a", {"separator": ""}, "separator is empty"),
        ("t.txt", "a", {"column": "text"}, "only where its delimiter is given"),
        ("t.jsonl", '{"text": "a"}', {"separator": "x"}, "separator 'x' is for .txt"),
        ("t.jsonl", '{"texts": "a"}', {}, "no column 'text'; did you mean 'texts'"),
        ("t.jsonl", '{"text": ""}', {}, "holds no text"),
        ("t.pdf", "a", {}, "unsupported file type"),
    ],
)
def test_bad_input(tmp_path: Path, name: str, text: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_documents(written(tmp_path, name, text), **options)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_documents(tmp_path / "absent.txt")
    (tmp_path / "t.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_documents(tmp_path / "t.txt")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(documents=st.lists(st.text("ab c\n", min_size=1), max_size=8), length=st.integers(3, 9))
def test_packing_loses_no_token(tiny_tokenizer: PreTrainedTokenizerFast, documents: list[str], length: int) -> None:
    end = tiny_tokenizer.eos_token_id
    stream = [token for document in documents for token in [*tiny_tokenizer(document)["input_ids"], end]]
    rows = pack(documents, tiny_tokenizer, length)
    assert list(chain.from_iterable(rows)) == stream
    assert all(len(row) == length for row in rows[:-2])
    assert all(2 <= len(row) <= length for row in rows)
    assert len(rows) == -(-len(stream) // length)


def test_a_last_row_of_one_token_takes_one_from_the_row_before(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    # Seven letters that never merge and the end are eight tokens; in rows of 7 one would be left alone.
    rows = pack(["#!#!#!#"], tiny_tokenizer, 7)
    assert [len(row) for row in rows] == [6, 2]


def test_a_begin_token_of_its_own_opens_each_document(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    other = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, bos_token="<|pad|>", eos_token="<|endoftext|>"
    )
    begin, end = other.bos_token_id, other.eos_token_id
    letter = tiny_tokenizer("#")["input_ids"]
    assert pack(["#", "#"], other, 9) == [[begin, *letter, end, begin, *letter, end]]


def test_packing_bad_input(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="rows of 2 tokens"):
        pack(["a"], tiny_tokenizer, 2)
    endless = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="no end-of-text token"):
        pack(["a"], endless, 8)


def test_every_token_of_packed_text_but_the_first_is_a_label() -> None:
    assert as_features([[1, 2], [3]]) == [
        {"input_ids": [1, 2], "labels": [-100, 2]},
        {"input_ids": [3], "labels": [-100]},
    ]


def test_real_text(data_folder: Path) -> None:
    stories, counts = read_documents(data_folder / "text" / "tinystories.txt", separator="<|endoftext|>")
    assert (len(stories), counts) == (2317, {})
    reviews, counts = read_documents(data_folder / "text" / "imdb-test-pos.parquet")
    assert (len(reviews), counts) == (12_500, {})
    assert len(read_documents(data_folder / "text" / "test.txt")[0]) == 1
