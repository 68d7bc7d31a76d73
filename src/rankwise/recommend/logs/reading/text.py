"""Lines of text as tables: separated fields, JSON objects, Python dicts. Every broken line is told."""

from __future__ import annotations

import ast
import codecs
import gzip
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from rankwise.errors import UserError, shown
from rankwise.recommend.logs.reading.forms import COMPRESSED, Form

if sys.version_info >= (3, 14):
    from compression import zstd as zstd
else:
    from backports import zstd as zstd

ROW = "\0row"  # the number of a row in its file, from 1
TOO_LONG, NO_OBJECT = "more fields than columns", "no JSON object"
_OVERFLOW = ["\0first", "\0second", "\0third"]  # fields that the header does not name; the first may be empty
_TWICE = "_duplicated_0"  # what polars adds to a name that was there before
_BROKEN: dict[str, type[pl.DataType]] = {"row": pl.Int64, "reason": pl.String, "content": pl.String}
LARGEST = 2**32  # bytes of a compressed file that is read as a whole
LONGEST = 2**24  # bytes of a row, or little more; to read one takes ten times as many
_CHUNK = 2**20  # bytes that are looked at in one go
OPEN_QUOTE = "; a quotation mark may be open: where they are plain characters set quoting: false"
Tables = Iterator[tuple[pl.DataFrame, pl.DataFrame]]  # rows, and the broken ones


def broken_rows(rows: pl.DataFrame, reason: str) -> pl.DataFrame:
    """Of rows of a table: their number, why they are broken, and their fields as JSON, up to the last with a value."""
    content = [json.dumps(_filled(fields), ensure_ascii=False) for fields in rows.drop(ROW).iter_rows()]
    return pl.DataFrame({"row": rows[ROW].to_list(), "reason": [reason] * rows.height, "content": content}, _BROKEN)


def _filled(fields: Sequence[str | None]) -> list[str | None]:
    last = max((place for place, field in enumerate(fields) if field is not None), default=-1)
    return list(fields[: last + 1])


def check_lines(path: Path, form: Form) -> None:
    """See that no row of a text file is too long for memory, which a small compressed file can hold.

    Where quotes enclose fields, a line that ends between two of them goes on with the next, as polars reads it.

    Raises:
        UserError: one is, or the file is in UTF-16 and the encoding UTF-8.
        OSError, EOFError, zlib.error, ZstdError: the file is broken.
    """
    quotes = form.quoting and form.is_csv
    begun, quoted = 0, False  # bytes of a row that has not ended, and whether a quote is open in it
    with _opened(path) as file:
        while chunk := file.read(_CHUNK):
            # polars would read it as text that is full of NUL characters.
            if form.encoding == "utf8" and chunk.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise UserError(f"{path}: it is in UTF-16: save it in UTF-8")
            quoted ^= quotes and chunk.count(b'"') % 2 == 1
            last = _last_end(chunk, quoted) if quotes else chunk.rfind(b"\n")
            begun = len(chunk) - 1 - last if last >= 0 else begun + len(chunk)
            if begun > LONGEST:
                remedy = "break it, or write the file again" + OPEN_QUOTE * quotes
                raise UserError(f"{path}: a line has more than {LONGEST} bytes: {remedy}")


def _last_end(chunk: bytes, quoted: bool) -> int:
    """The place of the last line feed that is not in quotes, -1 if there is none; ``quoted``: the end is in quotes."""
    last = chunk.rfind(b"\n")
    if last < 0 or chunk.count(b'"', last) % 2 == quoted:
        return last
    codes = np.frombuffer(chunk, np.uint8)
    in_quotes = np.logical_xor.accumulate(codes[::-1] == ord('"'))[::-1] != quoted
    ends = np.flatnonzero((codes == ord("\n")) & ~in_quotes)
    return int(ends[-1]) if len(ends) else -1


def separated(path: Path, form: Form, rows: int) -> Tables:
    """Tables of separated fields. A line that is too short has nulls at its end, which who uses the columns judges."""
    return _scan_csv(path, form, rows) if form.is_csv else _split_lines(path, form, rows)


def _scan_csv(path: Path, form: Form, rows: int) -> Tables:
    names, source = form.names or _header(path, form), _source(path, form)
    # More columns than the header names catch lines that are too long, which would be cut in silence.
    scanned = pl.scan_csv(
        source,
        separator=form.separator or ",",
        quote_char='"' if form.quoting else None,
        has_header=not form.names,
        schema=dict.fromkeys([*names, *_OVERFLOW], pl.String),
        missing_columns="insert",
        truncate_ragged_lines=True,
        row_index_name=ROW,
        row_index_offset=1,
        glob=False,
    )
    for table in scanned.collect_batches(chunk_size=rows, maintain_order=True):
        table = table.with_columns(pl.col(ROW).cast(pl.Int64))
        fits = pl.all_horizontal(pl.col(_OVERFLOW).is_null())
        yield table.filter(fits).drop(_OVERFLOW), broken_rows(table.filter(~fits), TOO_LONG)


def _header(path: Path, form: Form) -> list[str]:
    source, quote = _source(path, form), '"' if form.quoting else None
    separator = form.separator or ","
    read = pl.scan_csv(source, separator=separator, quote_char=quote, infer_schema=False, n_rows=0, glob=False)
    names = read.collect_schema().names()
    twice = [name.removesuffix(_TWICE) for name in names if name.endswith(_TWICE)]
    if twice:
        raise UserError(f"{path}: the header names the column {shown(twice[0])} twice; rename one of them")
    return names


def _split_lines(path: Path, form: Form, rows: int) -> Tables:
    assert form.names and form.separator  # a separator of several characters comes from a published form
    for lines in _lines(path, form, rows):
        fields = lines.select(ROW, fields=pl.col("line").str.split(form.separator))
        table = fields.select(
            ROW,
            *(pl.col("fields").list.get(place, null_on_oob=True).alias(name) for place, name in enumerate(form.names)),
        )
        long = fields["fields"].list.len() > len(form.names)
        yield table.filter(~long), broken_rows(lines.filter(long), TOO_LONG)


def objects(path: Path, form: Form, rows: int) -> Tables:
    """Tables of one object a line: a column for each key of the batch, empty lines left out."""
    parse = _literal if form.literals else _json_object
    for lines in _lines(path, form, rows):
        yield _table(lines, parse)


def _table(lines: pl.DataFrame, parse: Callable[[str], dict[str, object] | None]) -> tuple[pl.DataFrame, pl.DataFrame]:
    values = [parse(line) for line in lines["line"]]
    names = list(dict.fromkeys(name for value in values if value for name in value))
    found = [value for value in values if value is not None]
    columns = {name: [_scalar_text(value.get(name)) for value in found] for name in names}
    is_object = pl.Series([value is not None for value in values], dtype=pl.Boolean)
    table = pl.DataFrame(columns, schema=dict.fromkeys(names, pl.String))
    numbers = lines.filter(is_object)[ROW]
    whole = table.insert_column(0, numbers) if names else numbers.to_frame()
    return whole, broken_rows(lines.filter(~is_object), NO_OBJECT)


def _lines(path: Path, form: Form, rows: int) -> Iterator[pl.DataFrame]:
    """Numbered lines that are not empty. Only a line feed ends one: a title may hold U+2028."""
    scanned = pl.scan_lines(_source(path, form), row_index_name=ROW, row_index_offset=1, glob=False)
    for lines in scanned.collect_batches(chunk_size=rows, maintain_order=True):
        line = pl.col("line").str.strip_chars_start("\ufeff").str.strip_chars_end("\r")
        text = lines.with_columns(pl.col(ROW).cast(pl.Int64), line)
        yield text.filter(pl.col("line").str.strip_chars() != "")


def _source(path: Path, form: Form) -> Path | bytes:
    if form.encoding == "utf8":
        return path
    if path.suffix.lower() in COMPRESSED:
        return _unpacked(path).decode(form.encoding).encode()
    return path.read_text(encoding=form.encoding).encode()


def _unpacked(path: Path) -> bytes:
    with _opened(path) as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise UserError(
            f"{path}: it has more than {LARGEST} bytes, too many for a file that is not in UTF-8: convert it"
        )
    return content


def _opened(path: Path) -> BufferedIOBase:
    """A file, unpacked where it is compressed, as bytes."""
    kinds: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".zst": zstd.open}
    opened: BufferedIOBase = kinds.get(path.suffix.lower(), open)(path, "rb")
    return opened


def _json_object(line: str) -> dict[str, object] | None:
    try:
        value = json.loads(line)
        if "\\u" in line:  # half of a surrogate pair is valid JSON and no text
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and value else None


def _literal(line: str) -> dict[str, object] | None:
    try:
        value = ast.literal_eval(line)
        json.dumps(value, ensure_ascii=False, skipkeys=True, default=str).encode()  # as for JSON
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, dict) and value and all(isinstance(key, str) for key in value) else None


def _scalar_text(value: object) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return ", ".join(value)
    if value is None or isinstance(value, bool | dict | list):
        return None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
