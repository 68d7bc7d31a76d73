"""A table in a file or a folder of files, read a batch of rows at a time, so that its size does not matter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from rankwise.errors import UserError
from rankwise.recommend.logs.reading.columns import as_text
from rankwise.recommend.logs.reading.forms import ACCEPTED, COLUMNAR, COMPRESSED, SUFFIXES, Form
from rankwise.recommend.logs.reading.text import ROW, Tables, broken_rows, objects, separated

ROWS = 1_000_000  # of a batch
NO_ROWS = "it is empty but for its header"
_STATE, _SPLITS = "state.json", "dataset_dict.json"  # of a folder that the datasets library wrote


@dataclass(frozen=True, eq=False)
class Batch:
    """Some rows of a file, all as text (null where there is no value), with their number in it, and its broken rows.

    Broken are lines with more fields than the header has names, and JSON lines that are no object: ``row``,
    ``reason`` and ``content``.
    """

    path: Path
    table: pl.DataFrame
    broken: pl.DataFrame


def read_batches(path: Path, form: Form | None = None, rows: int = ROWS) -> Iterator[Batch]:
    """The rows of a file, or of all files of a folder by name, in batches of about as many rows.

    Args:
        path: a file, a folder of files, or a dataset that the datasets library saved to disk. Names that begin with
            a dot or an underscore are passed over.
        form: how the files are written; by default what their suffixes say.
        rows: of a batch.

    Raises:
        UserError: a file is missing, of an unknown kind, or not readable as its suffix says, or all have no byte.
    """
    for file in files(Path(path), form):
        try:
            for table, broken in _tables(file, form, rows):
                if table.height + broken.height:
                    yield Batch(file, table, broken)
        except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
            kind = _suffix(file)[1:].upper() or "text"
            encoding = form.encoding.upper() if form and form.encoding != "utf8" else "UTF-8"
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{file}: not readable as {kind} in {encoding} ({reason})") from error


def read_table(path: Path, form: Form | None = None) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The rows of all batches as one table, without their numbers, and the broken ones.

    Raises:
        UserError: as :func:`read_batches`, or no row is whole.
    """
    batches = list(read_batches(path, form))
    if not batches:
        raise UserError(f"{path}: {NO_ROWS}")
    table = pl.concat([batch.table for batch in batches], how="diagonal")
    broken = pl.concat([batch.broken for batch in batches])
    if table.is_empty():
        raise UserError(f"{path}: all {broken.height} rows are unparsable")
    return table.drop(ROW), broken


def files(path: Path, form: Form | None = None) -> list[Path]:
    """The files of a table.

    Raises:
        UserError: there is none, one is of an unknown kind, or all are empty.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file")
    found = _folder(path) if path.is_dir() else [path]
    for file in found:
        if form is None and _suffix(file) not in (*SUFFIXES, *COLUMNAR):
            raise UserError(f"{file}: cannot read {file.suffix or 'a file without suffix'!r}; accepted: {ACCEPTED}")
    filled = [file for file in found if file.stat().st_size]
    if not filled:
        raise UserError(f"{path}: {'no file in this folder' if not found else 'the file is empty'}")
    return filled


def _folder(path: Path) -> list[Path]:
    if (path / _SPLITS).is_file():
        splits = json.loads((path / _SPLITS).read_text(encoding="utf-8"))["splits"]
        raise UserError(f"{path}: a dataset with the parts {', '.join(splits)}: give the folder of one of them")
    if (path / _STATE).is_file():
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        if state.get("_indices_files"):
            raise UserError(f"{path}: a dataset with a selection of its rows: save its flatten_indices() to disk")
        return [path / file["filename"] for file in state["_data_files"]]
    return sorted(file for file in path.iterdir() if file.is_file() and file.name[0] not in "._")


def _suffix(path: Path) -> str:
    """Of the file, compressed or not, in lower case."""
    name = Path(path.stem) if path.suffix.lower() in COMPRESSED else path
    return name.suffix.lower()


def _tables(path: Path, form: Form | None, rows: int) -> Tables:
    suffix = _suffix(path)
    if form is None and suffix in COLUMNAR:
        return _columnar(path, suffix, rows)
    chosen = form or SUFFIXES[suffix]
    return separated(path, chosen, rows) if chosen.separator else objects(path, chosen, rows)


def _columnar(path: Path, suffix: str, rows: int) -> Tables:
    number = 0
    for table in _columns(path, suffix, rows):
        texts = pl.DataFrame([as_text(column) for column in table])
        yield texts.with_row_index(ROW, number + 1).with_columns(pl.col(ROW).cast(pl.Int64)), _NONE
        number += table.height


def _columns(path: Path, suffix: str, rows: int) -> Iterator[pl.DataFrame]:
    if suffix == ".parquet":
        yield from pl.scan_parquet(path, glob=False).collect_batches(chunk_size=rows, maintain_order=True)
    elif _begins(path, b"ARROW1"):
        yield from pl.scan_ipc(path, glob=False).collect_batches(chunk_size=rows, maintain_order=True)
    else:  # the stream format, which the datasets library writes, half a gigabyte a file
        yield from pl.read_ipc_stream(path).iter_slices(rows)


def _begins(path: Path, mark: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(mark)) == mark


_NONE = broken_rows(pl.DataFrame(schema={ROW: pl.Int64}), "")
