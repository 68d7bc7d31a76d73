"""Counts of what a reader dropped or ignored: nothing is lost in silence."""

from __future__ import annotations

UNPARSABLE = "unparsable rows"


def count(counts: dict[str, int], what: str, number: int = 1) -> None:
    """Add ``number`` to what was counted under ``what``; zero leaves no entry."""
    if number:
        counts[what] = counts.get(what, 0) + number
