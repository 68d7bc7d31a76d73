"""Columns found by name, and typed values as text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from rankwise.errors import UserError, nearest


def as_text(column: pl.Series) -> pl.Series:
    """Text of a typed column; whole floats lose their ``.0``: ids become floats where some are missing.

    Lists of texts are joined by a comma; what has no text of its own is null.
    """
    if column.dtype == pl.String:
        return column
    if column.dtype.is_float():
        whole = column.cast(pl.Int64, strict=False)
        is_whole = (whole.cast(column.dtype) == column).fill_null(False)
        return whole.cast(pl.String).zip_with(is_whole, column.cast(pl.String))
    if column.dtype in (pl.Datetime, pl.Date):
        return column.cast(pl.Datetime("us")).dt.to_string("iso:strict")
    if column.dtype == pl.List(pl.String):
        return column.list.join(", ")
    if column.dtype.is_nested() or column.dtype in (pl.Binary, pl.Duration, pl.Time, pl.Object, pl.Null):
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
