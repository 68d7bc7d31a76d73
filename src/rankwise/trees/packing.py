"""Which trees share a row: few rows of one width, little padding."""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Put things of these lengths into few rows of at most ``width`` tokens: longest first, each where it fits first.

    A thing that is longer than ``width`` gets a row of its own. First-fit decreasing takes at most 11/9 of the
    fewest rows possible, and two thirds of a row (Johnson 1973).

    Returns:
        The indices in each row; rows in the order in which they were opened.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        row = next((number for number, left in enumerate(room) if lengths[index] <= left), None)
        if row is None:
            rows.append([index])
            room.append(width - lengths[index])
        else:
            rows[row].append(index)
            room[row] -= lengths[index]
    return rows
