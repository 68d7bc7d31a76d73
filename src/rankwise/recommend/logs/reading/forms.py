"""How a file is written, where its suffix does not tell."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """How a table is written.

    Attributes:
        separator: between two fields of a line, of one character or more; none for one JSON object a line.
        names: of the columns, in a file without a header.
        encoding: of the text. A file that is not in UTF-8 is read as a whole.
        quoting: whether quotes enclose fields.
        literals: whether a line's object is written as Python prints a dict, not as JSON.
    """

    separator: str | None = None
    names: tuple[str, ...] = ()
    encoding: str = "utf8"
    quoting: bool = True
    literals: bool = False

    @property
    def is_csv(self) -> bool:
        """Whether polars splits its lines, quotes and all: where the separator is one byte."""
        return self.separator is not None and len(self.separator.encode()) == 1


SUFFIXES = {
    ".csv": Form(separator=","),
    ".tsv": Form(separator="\t"),
    ".jsonl": Form(),
    ".ndjson": Form(),
}
COLUMNAR = (".parquet", ".arrow", ".feather")  # which tell how they are written
COMPRESSED = (".gz", ".zst")
ACCEPTED = f"{', '.join((*SUFFIXES, *COLUMNAR))}, the text among them also with {' or '.join(COMPRESSED)}"
