"""A validation part for data that comes as one file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

from rankwise.errors import UserError

Item = TypeVar("Item")


def hold_out(rows: Sequence[Item], held: float | int, seed: int) -> tuple[list[Item], list[Item]]:
    """Split rows into (train, validation): ``held`` of them, drawn by ``seed``, are the validation rows.

    Every row lands in exactly one part and each part keeps the order of the file. Rows are ranked by a hash
    of seed and position, so the split is the same on every machine and Python, and the validation rows of a
    smaller ``held`` are among those of a larger one. Rows are told apart by position, not by content: a row
    that stands twice in the file can land in both parts.

    Args:
        rows: at least two rows.
        held: a share (``float`` between 0 and 1, rounded to at least one row) or a number of rows (``int``).
        seed: which of the possible splits.

    Raises:
        UserError: ``held`` leaves one of the parts empty.
    """
    number = _number(len(rows), held)
    ranked = sorted(range(len(rows)), key=lambda position: _rank(seed, position))
    chosen = set(ranked[:number])
    train = [row for position, row in enumerate(rows) if position not in chosen]
    return train, [row for position, row in enumerate(rows) if position in chosen]


def _number(total: int, held: float | int) -> int:
    if isinstance(held, float) and not 0 < held < 1:
        raise UserError(f"held-out share {held} must lie between 0 and 1 (a whole number is a number of rows)")
    number = max(1, round(held * total)) if isinstance(held, float) else int(held)
    if not 0 < number < total:
        raise UserError(f"cannot hold out {held} of {total} rows: both parts need at least one")
    return number


def _rank(seed: int, position: int) -> bytes:
    return hashlib.sha256(f"{seed}:{position}".encode()).digest()
