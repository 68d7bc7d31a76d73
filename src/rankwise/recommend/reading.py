"""A table of text columns from a CSV, TSV, JSONL, NDJSON or Parquet file, and its columns found by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from rankwise.errors import UserError, nearest

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_OVERFLOW = "\0overflow"
_TWICE = "_duplicated_0"  # what polars adds to a name that was there before


def read_table(path: Path) -> tuple[pl.DataFrame, int]:
    """Every column of ``path`` as text (null where there is no value), and the number of lines left out.

    Unparsable are CSV lines with more fields than the header has names, and JSON lines that are no object. A
    CSV line that is too short has nulls at its end, which the reader of the columns judges.

    Raises:
        UserError: the file is missing, of an unknown kind, empty, or not readable as its suffix says.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: cannot read {suffix or 'a file without suffix'!r}; accepted: {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    try:
        table, unparsable = _read(path, suffix)
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: not readable as {suffix[1:].upper()} in UTF-8 ({reason})") from error
    if table.height == 0:
        reason = f"all {unparsable} rows are unparsable" if unparsable else "the file is empty but for its header"
        raise UserError(f"{path}: {reason}")
    return table, unparsable


def _read(path: Path, suffix: str) -> tuple[pl.DataFrame, int]:
    if suffix in (".csv", ".tsv"):
        return _read_separated(path, "," if suffix == ".csv" else "\t")
    if suffix == ".parquet":
        return pl.DataFrame([_text(column) for column in pl.read_parquet(path)]), 0
    return _read_json_lines(path)


def _read_separated(path: Path, separator: str) -> tuple[pl.DataFrame, int]:
    names = pl.read_csv(path, separator=separator, infer_schema=False, n_rows=0).columns
    twice = [name.removesuffix(_TWICE) for name in names if name.endswith(_TWICE)]
    if twice:
        raise UserError(f"{path}: the header names the column {twice[0]!r} twice; rename one of them")
    # One column more than the header names catches lines that are too long, which would be cut in silence.
    table = pl.read_csv(
        path,
        separator=separator,
        schema=dict.fromkeys([*names, _OVERFLOW], pl.String),
        missing_columns="insert",
        truncate_ragged_lines=True,
    )
    whole = table.filter(pl.col(_OVERFLOW).is_null()).drop(_OVERFLOW)
    return whole, table.height - whole.height


def _read_json_lines(path: Path) -> tuple[pl.DataFrame, int]:
    # Not splitlines(): a title may hold U+2028, which JSON does not escape.
    lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    objects = [value for line in lines if (value := _json_object(line)) is not None]
    names = list(dict.fromkeys(name for value in objects for name in value))
    columns = {name: [_scalar_text(value.get(name)) for value in objects] for name in names}
    return pl.DataFrame(columns, schema=dict.fromkeys(names, pl.String)), len(lines) - len(objects)


def _json_object(line: str) -> dict[str, object] | None:
    try:
        value = json.loads(line)
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is valid JSON and no text
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _scalar_text(value: object) -> str | None:
    if value is None or isinstance(value, bool | dict | list):
        return None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _text(column: pl.Series) -> pl.Series:
    """Text of a typed column; whole floats lose their ``.0``: ids become floats where some are missing."""
    if column.dtype.is_float():
        whole = column.cast(pl.Int64, strict=False)
        is_whole = (whole.cast(column.dtype) == column).fill_null(False)
        return whole.cast(pl.String).zip_with(is_whole, column.cast(pl.String))
    if column.dtype in (pl.Datetime, pl.Date):
        return column.cast(pl.Datetime("us")).dt.to_string("iso:strict")
    if column.dtype.is_nested() or column.dtype == pl.Binary:
        return pl.Series(column.name, [None] * len(column), dtype=pl.String)
    return column.cast(pl.String, strict=False)


def find_column(path: Path, columns: Sequence[str], role: str, name: str | None, common: Sequence[str]) -> str:
    """The column of a table for a ``role``: the one that was named, else the first with a ``common`` name.

    Raises:
        UserError: the named column is missing, or none was named and none is found.
    """
    found = find_optional_column(path, columns, role, name, common)
    if found is None:
        raise UserError(f"{path}: no column found for the {role}, name it; {nearest(role, columns)}")
    return found


def find_optional_column(
    path: Path, columns: Sequence[str], role: str, name: str | None, common: Sequence[str]
) -> str | None:
    """As ``find_column``, but ``None`` where none was named and none is found."""
    if name is not None:
        if name not in columns:
            raise UserError(f"{path}: no column {name!r} for the {role}; {nearest(name, columns)}")
        return name
    plain = {_plain(column): column for column in reversed(columns)}
    return next((plain[_plain(option)] for option in common if _plain(option) in plain), None)


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace(" ", "").replace("-", "")
