"""A table in a file or a folder of files, read a batch of rows at a time, so that its size does not matter."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from rankwise.errors import UserError, shown
from rankwise.reading import first_line, is_file_name, read_json
from rankwise.recommend.logs.reading.columns import as_text
from rankwise.recommend.logs.reading.forms import ACCEPTED, COLUMNAR, COMPRESSED, SUFFIXES, Form
from rankwise.recommend.logs.reading.text import (
    OPEN_QUOTE,
    ROW,
    Tables,
    broken_rows,
    check_lines,
    objects,
    separated,
    zstd,
)

ROWS = 250_000  # of a batch
NO_ROWS = "it is empty but for its header"
BROKEN = (
    *(pl.exceptions.PolarsError, pl.exceptions.PanicException),
    *(UnicodeDecodeError, OSError, EOFError, zlib.error, zstd.ZstdError),
)
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


Choose = Callable[[Sequence[str]], Collection[str]]  # of a file's columns, those to read


def read_batches(
    path: Path, form: Form | None = None, quoting: bool = True, choose: Choose | None = None
) -> Iterator[Batch]:
    """The rows of a file, or of all files of a folder by name, in batches of about as many rows.

    Args:
        path: a file, a folder of files, or a dataset that the datasets library saved to disk. Names that begin with
            a dot or an underscore are passed over.
        form: how the files are written; by default what their suffixes say.
        quoting: whether quotes enclose fields, where the form does not say.
        choose: the columns to read of a Parquet or Arrow file, all by default; others are read as a whole.

    Raises:
        UserError: a file is missing, of an unknown kind, or not readable as its suffix says, or all have no byte.
    """
    for file in files(Path(path), form):
        try:
            for table, broken in _tables(file, form, quoting, choose):
                if table.height + broken.height:
                    yield Batch(file, table, broken)
        except pl.exceptions.NoDataError:
            continue
        except BROKEN as error:
            kind = _suffix(file)[1:].upper() or "text"
            encoding = form.encoding.upper() if form and form.encoding != "utf8" else "UTF-8"
            reason = first_line(error)
            hint = OPEN_QUOTE * ('"' in reason or "CSV malformed" in reason)
            raise UserError(f"{file}: not readable as {kind} in {encoding} ({reason}){hint}") from error


def read_table(
    path: Path, form: Form | None = None, quoting: bool = True, choose: Choose | None = None
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The rows of all batches as one table, without their numbers, and the broken ones.

    Raises:
        UserError: as :func:`read_batches`, or no row is whole.
    """
    batches = list(read_batches(path, form, quoting, choose))
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
        parts = sorted(folder.name for folder in path.iterdir() if folder.is_dir())
        raise UserError(f"{path}: a dataset with the parts {', '.join(parts)}: give the folder of one of them")
    if (path / _STATE).is_file():
        return _saved_dataset(path)
    found = sorted(file for file in path.iterdir() if file.name[0] not in "._")
    folders = [file.name for file in found if file.is_dir()]
    if folders:
        raise UserError(f"{path}: holds the folder {folders[0]}, and folders in folders are not read: give one of them")
    return found


def _saved_dataset(path: Path) -> list[Path]:
    state = read_json(path / _STATE, dict, "save the dataset again")
    try:
        names, selected = [file["filename"] for file in state["_data_files"]], state.get("_indices_files")
    except (KeyError, TypeError) as error:
        raise UserError(f"{path / _STATE}: not what the datasets library writes: save the dataset again") from error
    if stray := [name for name in names if not is_file_name(name)]:
        raise UserError(f"{path / _STATE}: {shown(stray[0])} is no file of this folder: save the dataset again")
    files = [path / name for name in names]
    if selected:
        raise UserError(f"{path}: a dataset with a selection of its rows: save its flatten_indices() to disk")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{path}: a dataset without its file {missing[0]}: save it again")
    return files


def _suffix(path: Path) -> str:
    """Of the file, compressed or not, in lower case."""
    name = Path(path.stem) if path.suffix.lower() in COMPRESSED else path
    return name.suffix.lower()


def _tables(path: Path, form: Form | None, quoting: bool, choose: Choose | None) -> Tables:
    suffix = _suffix(path)
    if form is None and suffix in COLUMNAR:
        return _columnar(path, suffix, choose)
    chosen = form or replace(SUFFIXES[suffix], quoting=quoting)
    check_lines(path, chosen)
    return separated(path, chosen, ROWS) if chosen.separator else objects(path, chosen, ROWS)


def _columnar(path: Path, suffix: str, choose: Choose | None) -> Tables:
    number = 0
    for table in _columns(path, suffix, choose):
        texts = pl.DataFrame([as_text(column) for column in table])
        yield texts.with_row_index(ROW, number + 1).with_columns(pl.col(ROW).cast(pl.Int64)), _NONE
        number += table.height


def _columns(path: Path, suffix: str, choose: Choose | None) -> Iterator[pl.DataFrame]:
    if suffix == ".parquet":
        scanned = pl.scan_parquet(path, glob=False)
    elif _begins(path, b"ARROW1"):
        scanned = pl.scan_ipc(path, glob=False)
    else:  # the stream format, which the datasets library writes, half a gigabyte a file
        scanned = pl.read_ipc_stream(path).lazy()
    names = scanned.collect_schema().names()
    wanted = names if choose is None else choose(names)
    yield from scanned.select(name for name in names if name in wanted).collect_batches(
        chunk_size=ROWS, maintain_order=True
    )


def _begins(path: Path, mark: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(mark)) == mark


_NONE = broken_rows(pl.DataFrame(schema={ROW: pl.Int64}), "")
