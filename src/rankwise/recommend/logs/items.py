"""Lists of items: what there is to recommend, and what each thing is called."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from rankwise.errors import UserError, shown
from rankwise.recommend.logs.reading import Form, find_column, read_table

ITEM = (
    "item",
    "item_id",
    "movie_id",
    "film_id",
    "product_id",
    "artist_id",
    "asin",
    "book_id",
    "song_id",
)
_TITLE = ("title", "name", "movie_title", "item_title")
_ARTICLE = re.compile(
    r"^(?P<rest>.+?), (?P<article>The|A|An|Les|Le|La|L'|Los|Las|El|Il|Lo|I|Der|Die|Das|Det|Den|De|Un|Une|Una)"
    r"(?P<tail> \(.*)?$"
)


@dataclass(frozen=True)
class ItemColumns:
    """The column names of an item list; ``None`` finds the column by a common name."""

    item: str | None = None
    title: str | None = None
    extra: tuple[str, ...] = ()  # further columns to keep as text, such as genres


def read_items(
    path: Path,
    columns: ItemColumns | None = None,
    tidy: bool = False,
    form: Form | None = None,
    quoting: bool = True,
) -> tuple[pl.DataFrame, dict[str, int]]:
    """An item list as ``item, title`` (text) and the extra columns; ``tidy`` moves articles to the front.

    Dropped and counted: unparsable rows, items without title, items listed twice (the first stays). Items
    that share one title all stay, and are counted: a title is what a language model ranks, so they count as
    one item from here on.

    Raises:
        UserError: the file or a column is missing, the file is empty, or no item has a title.
    """
    wanted = columns or ItemColumns()
    table, broken = read_table(path, form, quoting, lambda found: _columns(path, found, wanted))
    item, title, *extra = _columns(path, table.columns, wanted)
    listed = table.select(
        blank_to_null(item).alias("item"),
        blank_to_null(title, collapse=True).alias("title"),
        *(blank_to_null(name, collapse=True).alias(name) for name in extra),
    )
    known = listed.filter(pl.col("item").is_not_null())
    titled = known.filter(pl.col("title").is_not_null())
    if titled.is_empty():
        raise UserError(
            f"{path}: no row has both an item in {shown(item)} and a title in {shown(title)}; check the column names"
        )
    items = titled.unique(subset="item", keep="first", maintain_order=True)
    if tidy:
        items = items.with_columns(pl.col("title").map_elements(tidy_title, return_dtype=pl.String))
    return items, {
        "items read": listed.height + broken.height,
        "unparsable item rows": listed.height - known.height + broken.height,
        "items without title": known.height - titled.height,
        "items listed twice": titled.height - items.height,
        "items that share another's title": items.height - items["title"].n_unique(),
    }


def _columns(path: Path, found: Sequence[str], columns: ItemColumns) -> list[str]:
    item = find_column(path, found, "item", columns.item, (*ITEM, "id"))
    title = find_column(path, found, "title", columns.title, _TITLE)
    return [item, title, *(find_column(path, found, "extra column", name, ()) for name in columns.extra)]


def items_as_titles(ids: pl.Series, tidy: bool) -> pl.DataFrame:
    """An item list for a log whose items are titles themselves."""
    items = pl.DataFrame({"item": ids.unique(maintain_order=True)})
    items = items.with_columns(title=pl.col("item").str.replace_all(r"\s+", " "))
    return items.with_columns(pl.col("title").map_elements(tidy_title, return_dtype=pl.String)) if tidy else items


def blank_to_null(name: str, collapse: bool = False) -> pl.Expr:
    """A column of text without space around it, and ``collapse``d inside; null where nothing is left."""
    text = pl.col(name).str.strip_chars()
    if collapse:
        text = text.str.replace_all(r"\s+", " ")
    return pl.when(text != "").then(text)


def tidy_title(title: str) -> str:
    """A title with its article in front, as a sentence would have it.

    Example:
        >>> tidy_title("Matrix, The (1999)")
        'The Matrix (1999)'
    """
    found = _ARTICLE.match(title)
    if found is None:
        return title
    article, rest, tail = found["article"], found["rest"], found["tail"] or ""
    return f"{article}{'' if article.endswith(chr(39)) else ' '}{rest}{tail}"
