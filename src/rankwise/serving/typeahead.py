"""Titles that a person may mean by the first letters."""

from __future__ import annotations

import polars as pl

from rankwise.recommend.store import Store


class TypeAhead:
    """Finds titles of a store by a part of them, letters' case aside."""

    def __init__(self, store: Store) -> None:
        plain = [" ".join(title.split()).casefold() for title in store.titles["title"]]
        self._titles = store.titles.select("title", pl.col("popularity").cast(pl.Int64)).with_columns(
            pl.Series("plain", plain, dtype=pl.String)
        )

    def find(self, text: str, limit: int) -> list[str]:
        """The titles with the text in them; first those that begin with it, then those with a word that does.

        Among equals the most popular comes first.
        """
        wanted = " ".join(text.split()).casefold()
        if not wanted:
            return []
        plain = pl.col("plain")
        order = (
            pl.when(plain.str.starts_with(wanted))
            .then(0)
            .when(plain.str.contains(" " + wanted, literal=True))
            .then(1)
            .otherwise(2)
        )
        found = (
            self._titles.filter(plain.str.contains(wanted, literal=True))
            .sort(order, -pl.col("popularity"), "title")
            .head(limit)
        )
        titles: list[str] = found["title"].to_list()
        return titles
