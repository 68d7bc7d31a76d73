"""Titles while a person types: those that fit the letters so far, the likeliest first."""

from __future__ import annotations

import heapq
import unicodedata
from collections.abc import Collection, Sequence
from typing import NamedTuple


class _Entry(NamedTuple):
    plain: str
    popularity: int
    title: str


class TitleSearch:
    """Finds titles by a part of them; letters' case, accents and punctuation aside.

    Args:
        titles: to find.
        popularity: of each; between titles that fit alike, the more popular goes first.
    """

    def __init__(self, titles: Sequence[str], popularity: Sequence[int]) -> None:
        pairs = zip(titles, popularity, strict=True)
        self._entries = [_Entry(plain(title), number, title) for title, number in pairs]

    def find(self, query: str, limit: int) -> list[str]:
        """At most ``limit`` titles that fit a query, the best first; the most popular ones where it is empty.

        First those that begin with it, then those of which a word does, then those that hold it somewhere, then those
        that hold all of its words.
        """
        wanted = plain(query)
        words = set(wanted.split())
        fits = ((_fit(entry.plain, wanted, words), entry) for entry in self._entries)
        found = ((fit, -entry.popularity, entry.title) for fit, entry in fits if fit is not None)
        return [title for _, _, title in heapq.nsmallest(limit, found)]


def plain(text: str) -> str:
    """Letters and digits without case and accents, in words with one space between; marks alone stay as they are."""
    letters = "".join(one for one in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(one))
    words = "".join(one if one.isalnum() else " " for one in letters).split()
    return " ".join(words or letters.split())


def _fit(title: str, wanted: str, words: Collection[str]) -> int | None:
    """How well a title fits, 0 the best; None where it does not."""
    if title.startswith(wanted):
        return 0
    if f" {wanted}" in title:
        return 1
    if wanted in title:
        return 2
    return 3 if all(word in title for word in words) else None
