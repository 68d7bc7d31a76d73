"""Classification: rows of one or two sentences and the number of their label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack

from rankwise.counting import count
from rankwise.errors import UserError
from rankwise.tasks.tables import TableOptions, as_text, read_rows, require_columns

NO_SENTENCE = "rows without a sentence"
NO_LABEL = "rows without a label"


class Classification(NamedTuple):
    """Rows of ``sentence1``, ``sentence2`` if there is one, and ``label``, a position in ``label_names``."""

    rows: list[dict[str, Any]]
    label_names: list[str]
    counts: dict[str, int]


def read_classification(
    path: Path,
    *,
    sentence1: str = "sentence1",
    sentence2: str | None = None,
    label: str = "label",
    label_names: Sequence[str] | None = None,
    **table: Unpack[TableOptions],
) -> Classification:
    """Read labelled sentences; rows with an empty cell are dropped and counted.

    Labels are names, whatever the file holds: ``1`` and ``"1"`` are one label. They are numbered in sorted
    order, by value where all are whole numbers, else by text.

    Args:
        path: a table (see `read_rows`).
        sentence1: the column of the (first) sentence.
        sentence2: the column of the second sentence, for pairs.
        label: the column of the label.
        label_names: for validation and test files, the names that the training file gave.
        **table: how a delimited file is written.

    Raises:
        UserError: the file cannot be read, a column is missing, no row is usable; the labels are scores
            rather than names; a training file has a single label; or a label is not among ``label_names``.
    """
    rows, counts = read_rows(path, **table)
    columns = {"sentence1": sentence1} | ({"sentence2": sentence2} if sentence2 is not None else {})
    require_columns(path, rows, [*columns.values(), label])
    labelled = [_cells(row, columns, label) for row in rows]
    kept = [row for row in labelled if all(row.values())]
    if not kept:
        raise UserError(f"{path} holds no row with text in every one of {', '.join([*columns.values(), label])}")
    unlabelled = sum(not row["label"] for row in labelled)
    count(counts, NO_LABEL, unlabelled)
    count(counts, NO_SENTENCE, len(rows) - len(kept) - unlabelled)
    names = list(label_names) if label_names is not None else _names(path, label, {row["label"] for row in kept})
    return Classification(_numbered(path, kept, names), names, counts)


def _cells(row: Mapping[str, Any], columns: Mapping[str, str], label: str) -> dict[str, str]:
    cells = {name: as_text(row.get(column)) for name, column in columns.items()}
    return {**cells, "label": as_text(row.get(label)).strip()}


def _names(path: Path, column: str, labels: set[str]) -> list[str]:
    if len(labels) < 2:
        raise UserError(f"{path}: every row has the {column} {min(labels)!r}; classification needs at least two")
    if any(_is_number(label) and not float(label).is_integer() for label in labels):
        scores = ", ".join(sorted(labels)[:3])
        raise UserError(f"{path}: the column {column!r} holds scores ({scores}, ...); give each row a label's name")
    if all(label.removeprefix("-").isdecimal() for label in labels):
        return sorted(labels, key=int)
    return sorted(labels)


def _is_number(label: str) -> bool:
    try:
        return float(label) - float(label) == 0
    except ValueError:
        return False


def _numbered(path: Path, rows: Sequence[Mapping[str, str]], names: Sequence[str]) -> list[dict[str, Any]]:
    numbers = {name: number for number, name in enumerate(names)}
    unseen = sorted({row["label"] for row in rows} - set(numbers))
    if unseen:
        known = ", ".join(names)
        raise UserError(f"{path}: label {unseen[0]!r} does not occur in the training data, which has {known}")
    return [{**row, "label": numbers[row["label"]]} for row in rows]
