"""Rows of comma- or tab-separated text, with every broken line counted.

The standard library splits the lines, not polars: a polars reader fills a short line with nulls, so that a
broken row and an empty cell look the same.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rankwise.counting import UNPARSABLE, count
from rankwise.errors import UserError, shown

Row = dict[str, str]
DELIMITERS = {".csv": ",", ".tsv": "\t", ".txt": None}
BROKEN_QUOTES = "lines with broken quotes (if quotes are plain characters, set quoting: false)"
EXTRA_FIELDS = "rows with extra fields, which were ignored"


def parse_delimited(
    path: Path,
    text: str,
    delimiter: str | None,
    header: bool,
    columns: Sequence[str] | None,
    quoting: bool,
    counts: dict[str, int],
) -> list[Row]:
    """The rows of a delimited text, as `read_rows` says; ``path`` gives the default delimiter."""
    delimiter = delimiter or DELIMITERS[path.suffix.lower()] or ""
    if header == (columns is not None):
        raise UserError(f"{path}: columns names the fields of a file without a header; it goes with header: false")
    if not delimiter or (quoting and len(delimiter) != 1) or delimiter in {"\n", "\r", '"'}:
        raise UserError(f"{path}: delimiter {delimiter!r} must be one character (several with quoting: false)")
    split: Callable[..., Iterator[list[str]]] = _split_quoted if quoting else _split_plain
    lines = split(path, text, delimiter, counts)
    names = list(columns) if columns is not None else next(lines, [])
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path}: column {shown(repeated)} is named twice")
    return _rows(names, lines, counts)


def _rows(names: Sequence[str], lines: Iterable[list[str]], counts: dict[str, int]) -> list[Row]:
    rows: list[Row] = []
    for fields in lines:
        if len(fields) < len(names):
            count(counts, UNPARSABLE)
            continue
        count(counts, EXTRA_FIELDS, int(len(fields) > len(names)))
        rows.append(dict(zip(names, fields, strict=False)))
    return rows


def _split_plain(path: Path, text: str, delimiter: str, counts: dict[str, int]) -> Iterator[list[str]]:
    for line in text.split("\n"):
        if line.strip("\r"):
            yield line.removesuffix("\r").split(delimiter)


def _split_quoted(path: Path, text: str, delimiter: str, counts: dict[str, int]) -> Iterator[list[str]]:
    """Split by the csv module, in its strict mode: that reports an unclosed quote instead of guessing."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        before = reader.line_num
        try:
            with _fields_of_any_size(len(text)):
                fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            swallowed = reader.line_num - before
            if "unexpected end of data" in str(error) and swallowed > 1:
                raise UserError(
                    f"{path}: a quotation mark opened in line {before + 1} is never closed; "
                    "where quotes are plain characters set quoting: false"
                ) from None
            count(counts, BROKEN_QUOTES, max(swallowed, 1))
            continue
        if fields:
            yield fields


@contextmanager
def _fields_of_any_size(size: int) -> Iterator[None]:
    """Lift the csv module's limit of 131,072 characters a field, one for the whole process, for a moment."""
    limit = csv.field_size_limit()
    csv.field_size_limit(max(limit, size))
    try:
        yield
    finally:
        csv.field_size_limit(limit)
