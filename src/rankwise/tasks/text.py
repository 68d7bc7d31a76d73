"""Plain text for language modelling: documents from files, and documents packed into rows of tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Unpack

from transformers import PreTrainedTokenizerBase

from rankwise.counting import count
from rankwise.errors import UserError
from rankwise.tasks.tables import TableOptions, as_text, check_file, read_rows, read_utf8, require_columns
from rankwise.tokenise import IGNORED, end_token, token_ids

BLANK_LINES = "blank lines"
DEFAULT_COLUMN = "text"
EMPTY = "empty documents"


def read_documents(
    path: Path, *, separator: str | None = None, column: str | None = None, **table: Unpack[TableOptions]
) -> tuple[list[str], dict[str, int]]:
    r"""Read the documents of a text file or of one column of a table.

    Line breaks around a document are cut off. Documents of nothing but white space are dropped and counted,
    except the one that a separator at the very end of a file leaves behind.

    Args:
        path: a ``.txt`` file, or a table (see `read_rows`).
        separator: what stands between the documents of a ``.txt`` file: any text such as ``"<|endoftext|>"``
            or ``"\n"``, or ``"blank lines"`` for one or more of them. By default the file is one document.
        column: the column of a table that holds the text; ``text`` by default.
        **table: how a delimited file is written.

    Raises:
        UserError: the file cannot be read or holds no document, the column is missing, or an option does not
            fit.
    """
    counts: dict[str, int] = {}
    if path.suffix.lower() == ".txt" and column is None and not table.get("delimiter"):
        documents = _split(path, separator)
    else:
        if separator is not None:
            raise UserError(f"{path}: separator {separator!r} is for .txt files; in a table each row is a document")
        rows, counts = read_rows(path, **table)
        name = column or DEFAULT_COLUMN
        require_columns(path, rows, [name])
        documents = [as_text(row.get(name)).strip("\r\n") for row in rows]
    kept = [document for document in documents if document.strip()]
    count(counts, EMPTY, len(documents) - len(kept))
    if not kept:
        raise UserError(f"{path} holds no text")
    return kept, counts


def pack(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int) -> list[list[int]]:
    """Join documents into one stream of tokens and cut it into rows of ``length``; no token is lost.

    Each document is closed by the end-of-text token, and opened by the beginning-of-text token where the
    tokenizer has one that is another. What is left at the end is a last, shorter row. A row of a single token
    would have nothing to predict, so in that case the row before it gives up its last token.

    Args:
        documents: the texts, in the order in which they are joined.
        tokenizer: must have an end-of-text token.
        length: tokens in a row, at least 3.

    Raises:
        UserError: ``length`` is too small or the tokenizer has no end-of-text token.
    """
    if length < 3:
        raise UserError(f"rows of {length} tokens are too short to pack text into; give at least 3")
    rows = list(_cut(_stream(documents, tokenizer), length))
    if len(rows) > 1 and len(rows[-1]) == 1:
        rows[-1].insert(0, rows[-2].pop())
    return rows


def as_features(packed: Iterable[Sequence[int]]) -> list[dict[str, list[int]]]:
    """Packed rows as training rows: every token but the first, which nothing foretells, is a label."""
    return [{"input_ids": list(row), "labels": [IGNORED, *row[1:]]} for row in packed]


def _split(path: Path, separator: str | None) -> list[str]:
    check_file(path)
    text = read_utf8(path).replace("\r\n", "\n")
    if separator == "":
        raise UserError(f"{path}: the separator is empty; leave it out for one document")
    if separator is None:
        parts = [text]
    else:
        parts = re.split(r"\n(?:[ \t]*\n)+", text) if separator == BLANK_LINES else text.split(separator)
    if len(parts) > 1 and not parts[-1].strip():
        parts.pop()
    return [part.strip("\r\n") for part in parts]


def _stream(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    end = end_token(tokenizer)
    begin = [] if tokenizer.bos_token_id in (None, end) else [tokenizer.bos_token_id]
    remaining = iter(documents)
    while chunk := list(islice(remaining, 1000)):
        for ids in token_ids(tokenizer, chunk):
            yield from begin
            yield from ids
            yield end


def _cut(stream: Iterator[int], length: int) -> Iterator[list[int]]:
    while row := list(islice(stream, length)):
        yield row
