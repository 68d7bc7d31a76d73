"""Rows of a user's file, whichever of the usual formats it has, with a count of what could not be used."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from rankwise.counting import UNPARSABLE, count
from rankwise.errors import UserError, nearest
from rankwise.reading import read_parquet
from rankwise.tasks.delimited import DELIMITERS, parse_delimited

Row = dict[str, Any]
SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")


class TableOptions(TypedDict, total=False):
    """How a delimited file is written; every reader of this room passes these on to `read_rows`."""

    delimiter: str | None
    header: bool
    columns: Sequence[str] | None
    quoting: bool


def read_rows(
    path: Path,
    *,
    delimiter: str | None = None,
    header: bool = True,
    columns: Sequence[str] | None = None,
    quoting: bool = True,
) -> tuple[list[Row], dict[str, int]]:
    """Read a table: one dict a row, and the counts of what was dropped (only those above zero).

    A line of JSON that does not parse, an element that is no object, a delimited line with too few fields:
    each is dropped and counted as ``unparsable rows``. Lines with broken quotes are counted apart, all of
    those that the quote swallowed. Fields beyond the last column are ignored and their rows counted. Blank
    lines are no rows.

    Args:
        path: a ``.json`` (list of objects, or one), ``.jsonl``, ``.ndjson``, ``.csv``, ``.tsv`` or ``.parquet`` file,
            in UTF-8 with or without a byte-order mark. A ``.txt`` file is read as a table where ``delimiter``
            is given.
        delimiter: what separates fields; by default the comma of ``.csv`` and the tab of ``.tsv``. With
            ``quoting=False`` it may be several characters, such as ``"::"``.
        header: whether the first line names the columns.
        columns: the names where there is no header. A line with more fields keeps the first ones.
        quoting: whether ``"`` quotes a field. Off for files such as GLUE's, where it is a plain character.

    Returns:
        The rows (values are ``str`` from delimited files, else what the file holds), and the counts.

    Raises:
        UserError: the file is missing, empty, of another kind, not UTF-8, or none of its rows is usable; or
            an option does not fit the file.
    """
    delimited = is_delimited(path, delimiter)
    if not delimited and (delimiter is not None or not header or columns is not None or not quoting):
        raise UserError(f"{path}: delimiter, header, columns and quoting are for .csv and .tsv files; leave them out")
    check_file(path)
    counts: dict[str, int] = {}
    if delimited:
        rows = parse_delimited(path, read_utf8(path), delimiter, header, columns, quoting, counts)
    else:
        rows = {".json": _read_json, ".parquet": _read_parquet}.get(path.suffix.lower(), _read_lines)(path, counts)
    if not rows:
        dropped = ", ".join(f"{number} {what}" for what, number in counts.items())
        raise UserError(f"{path} holds no usable row" + (f": {dropped}" if dropped else ""))
    return rows, counts


def is_delimited(path: Path, delimiter: str | None = None) -> bool:
    """Whether a file name stands for a delimited table; a name of no known kind is a `UserError`."""
    suffix = path.suffix.lower()
    if suffix == ".txt" and delimiter is None:
        raise UserError(f"{path}: a .txt file is a table only where its delimiter is given; accepted: {_accepted()}")
    if suffix not in SUFFIXES and suffix not in DELIMITERS:
        raise UserError(f"{path}: unsupported file type {suffix!r}; accepted: {_accepted()}")
    return suffix in DELIMITERS


def check_file(path: Path) -> None:
    """Raise a `UserError` where ``path`` is no file or an empty one."""
    if not path.is_file():
        raise UserError(f"{path} is a folder; name a file in it" if path.is_dir() else f"no such file: {path}")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty")


def read_utf8(path: Path) -> str:
    """The text of a UTF-8 file without its byte-order mark; line ends stay as they are."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); convert it to UTF-8 first") from None


def require_columns(path: Path, rows: Sequence[Mapping[str, Any]], names: Iterable[str]) -> None:
    """Raise a `UserError` for the first of ``names`` that no row has, with the nearest that there is."""
    present = columns_of(rows)
    for name in names:
        if name not in present:
            raise UserError(f"{path} has no column {name!r}; {nearest(name, present)}")


def columns_of(rows: Iterable[Mapping[str, Any]]) -> set[str]:
    """Every column that at least one row has."""
    return set().union(*(row.keys() for row in rows))


def as_text(value: object) -> str:
    """A cell as text: strings as they are, numbers written out; anything else, blanks and NaN as nothing."""
    if isinstance(value, str):
        return value if value.strip() else ""
    if isinstance(value, int | float):
        return str(value) if value == value else ""  # NaN is equal to nothing
    return ""


def _accepted() -> str:
    return ", ".join(SUFFIXES)


def _read_json(path: Path, counts: dict[str, int]) -> list[Row]:
    """Read a list of objects or one object over several lines; any other file is taken for JSON lines, as many are."""
    text = read_utf8(path)
    begun = text.lstrip()
    if not begun.startswith("["):
        if _parse(begun.partition("\n")[0]) is None and (whole := _parse(text)) is not None:
            return _objects([whole], text, counts)
        return _parse_lines(text, counts)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    return _objects(values, text, counts)


def _read_lines(path: Path, counts: dict[str, int]) -> list[Row]:
    return _parse_lines(read_utf8(path), counts)


def _parse_lines(text: str, counts: dict[str, int]) -> list[Row]:
    # Not str.splitlines: it also splits at U+2028 and its like, which JSON allows inside a string.
    return _objects((_parse(line) for line in text.split("\n") if line.strip()), text, counts)


def _parse(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _objects(values: Iterable[object], text: str, counts: dict[str, int]) -> list[Row]:
    rows: list[Row] = []
    escaped = "\\ud" in text.lower()
    for value in values:
        if isinstance(value, dict) and value and not (escaped and _has_half_character(value)):
            rows.append(value)
        else:
            count(counts, UNPARSABLE)
    return rows


def _has_half_character(value: Row) -> bool:
    r"""Whether a string holds half of an escaped pair, such as ``"\ud83d"`` alone: no tokeniser takes it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _read_parquet(path: Path, counts: dict[str, int]) -> list[Row]:
    rows: list[Row] = read_parquet(path, "write it again").to_dicts()
    return rows
