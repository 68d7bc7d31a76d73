"""At most so many rows, drawn by a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from rankwise.errors import UserError

Row = TypeVar("Row")


def sample(rows: Sequence[Row], limit: int | None, seed: int) -> tuple[list[Row], int]:
    """At most ``limit`` rows, drawn evenly by ``seed`` and kept in order, and the number left out.

    Raises:
        UserError: the limit is below 1.
    """
    chosen = picks(len(rows), limit, seed)
    return [rows[index] for index in chosen], len(rows) - len(chosen)


def picks(size: int, limit: int | None, seed: int) -> Sequence[int]:
    """The places, in order, of at most ``limit`` of ``size`` rows, drawn evenly by ``seed``.

    Raises:
        UserError: the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise UserError(f"a limit of {limit} rows leaves nothing: give 1 or more, or none for all")
    if limit is None or limit >= size:
        return range(size)
    return sorted(random.Random(f"{seed}:rows").sample(range(size), limit))
