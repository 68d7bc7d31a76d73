"""Small logs in files, for the tests of what becomes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

PARTS = ("train", "validation", "test")


def written(path: Path, rows: list[tuple[Any, ...]], columns: str = "user item time") -> Path:
    pl.DataFrame(rows, schema=columns.split(), orient="row").write_csv(path)
    return path
