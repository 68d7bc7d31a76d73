"""Logs of interactions and lists of items, from a file with any column names to normalised tables.

Nothing is lost in silence: each reader returns its table and a dict of counts (rows read, dropped by reason,
kept).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import polars as pl

from rankwise.errors import UserError
from rankwise.recommend.reading import find_column, read_table

_COMMON = {
    "user": ("user", "user_id", "uid", "customer_id", "reviewer_id", "visitor_id"),
    "item": (
        "item",
        "item_id",
        "movie_id",
        "film_id",
        "product_id",
        "artist_id",
        "asin",
        "book_id",
        "song_id",
    ),
    "time": ("time", "timestamp", "datetime", "date", "ts", "unix_review_time"),
    "rating": ("rating", "stars", "score", "overall"),
    "title": ("title", "name", "movie_title", "item_title"),
}
_ARTICLE = re.compile(
    r"^(?P<rest>.+?), (?P<article>The|A|An|Les|Le|La|L'|Los|Las|El|Il|Lo|I|Der|Die|Das|Det|Den|De|Un|Une|Una)"
    r"(?P<tail> \(.*)?$"
)


@dataclass(frozen=True)
class InteractionColumns:
    """The column names of a log; ``None`` finds it by a common name, such as ``userId`` or ``movie_id``."""

    user: str | None = None
    item: str | None = None
    time: str | None = None  # seconds since 1970 (or any other number that grows), or ISO 8601 text; no zone means UTC
    rating: str | None = None  # optional in the log


@dataclass(frozen=True)
class ItemColumns:
    """The column names of an item list; ``None`` finds the column by a common name."""

    item: str | None = None
    title: str | None = None
    extra: tuple[str, ...] = ()  # further columns to keep as text, such as genres


def read_interactions(
    path: Path, columns: InteractionColumns | None = None, minimum_rating: float | None = None
) -> tuple[pl.DataFrame, dict[str, int]]:
    """A log as ``user, item`` (text), ``time`` and, where it is named or filtered on, ``rating``, in file order.

    Dropped and counted: unparsable rows (no user or item, a time or rating that is none, a line with too many
    fields), then interactions below ``minimum_rating``, then duplicates: of one user and item the earliest
    stays, at equal times the first in the file.

    Raises:
        UserError: the file or a column is missing, the file is empty, or no row is left.
    """
    table, ragged = read_table(path)
    columns = columns or InteractionColumns()
    names = {
        role: find_column(path, table.columns, role, getattr(columns, role), _COMMON[role])
        for role in ("user", "item", "time")
    }
    if columns.rating is not None or minimum_rating is not None:  # otherwise an empty rating harms no row
        names["rating"] = find_column(path, table.columns, "rating", columns.rating, _COMMON["rating"])
    parsed = _parse(table, names)
    read = table.height + ragged
    if parsed.is_empty():
        raise UserError(f"{path}: all {read} rows are unparsable; mapped columns: {_mapping(names)}; check the names")
    rated = parsed if minimum_rating is None else parsed.filter(pl.col("rating") >= minimum_rating)
    if rated.is_empty():
        raise UserError(f"{path}: none of {parsed.height} interactions is rated {minimum_rating} or more; lower it")
    log = drop_duplicates(rated, "item")
    return log, {
        "interactions read": read,
        "unparsable rows": read - parsed.height,
        "interactions below the rating": parsed.height - rated.height,
        "duplicate interactions": rated.height - log.height,
    }


def read_items(
    path: Path, columns: ItemColumns | None = None, tidy: bool = False
) -> tuple[pl.DataFrame, dict[str, int]]:
    """An item list as ``item, title`` (text) and the extra columns; ``tidy`` moves articles to the front.

    Dropped and counted: unparsable rows, items without title, items listed twice (the first stays). Items
    that share one title all stay, and are counted: a title is what a language model ranks, so they count as
    one item from here on.

    Raises:
        UserError: the file or a column is missing, the file is empty, or no item has a title.
    """
    table, ragged = read_table(path)
    columns = columns or ItemColumns()
    item = find_column(path, table.columns, "item", columns.item, (*_COMMON["item"], "id"))
    title = find_column(path, table.columns, "title", columns.title, _COMMON["title"])
    extra = [find_column(path, table.columns, "extra column", name, ()) for name in columns.extra]
    listed = table.select(
        _blank_to_null(item).alias("item"),
        _blank_to_null(title, collapse=True).alias("title"),
        *(pl.col(name) for name in extra),
    )
    known = listed.filter(pl.col("item").is_not_null())
    titled = known.filter(pl.col("title").is_not_null())
    if titled.is_empty():
        raise UserError(f"{path}: no row has both an item in {item!r} and a title in {title!r}; check the column names")
    items = titled.unique(subset="item", keep="first", maintain_order=True)
    if tidy:
        items = items.with_columns(pl.col("title").map_elements(tidy_title, return_dtype=pl.String))
    return items, {
        "items read": listed.height + ragged,
        "unparsable item rows": listed.height - known.height + ragged,
        "items without title": known.height - titled.height,
        "items listed twice": titled.height - items.height,
        "items that share another's title": items.height - items["title"].n_unique(),
    }


def attach_titles(interactions: pl.DataFrame, items: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, int]]:
    """The log with the ``title`` of each item.

    Interactions with an item without title are dropped and counted. Two items of one title are one item to a
    model of titles: of a user's interactions with both, the earliest stays.

    Raises:
        UserError: no item of the log has a title.
    """
    titled = interactions.join(items.select("item", "title"), on="item", how="left", maintain_order="left")
    known = titled.filter(pl.col("title").is_not_null())
    if known.is_empty():
        examples = ", ".join(interactions["item"].head(3).to_list())
        raise UserError(f"no item of the log (such as {examples}) is in the item list; check the item columns")
    log = drop_duplicates(known, "title")
    return log, {
        "interactions with an item without title": titled.height - known.height,
        "interactions with another item of the same title": known.height - log.height,
    }


def drop_duplicates(log: pl.DataFrame, item: str) -> pl.DataFrame:
    """The earliest row of each user and ``item`` (at equal times the first in the file), in file order."""
    ordered = log.with_row_index("row").sort("time", maintain_order=True)
    earliest = ordered.unique(subset=["user", item], keep="first", maintain_order=True)
    return earliest.sort("row").drop("row")


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


def _mapping(names: dict[str, str]) -> str:
    return ", ".join(f"{role} = {name}" for role, name in names.items())


def _blank_to_null(name: str, collapse: bool = False) -> pl.Expr:
    text = pl.col(name).str.strip_chars()
    if collapse:
        text = text.str.replace_all(r"\s+", " ")
    return pl.when(text != "").then(text)


def _parse(table: pl.DataFrame, names: dict[str, str]) -> pl.DataFrame:
    """The rows in which every mapped column has a value of its kind."""
    parsed = table.select(
        _blank_to_null(names["user"]).alias("user"),
        _blank_to_null(names["item"]).alias("item"),
        _parse_times(table[names["time"]]).alias("time"),
        *([_number(pl.col(names["rating"])).alias("rating")] if "rating" in names else []),
    )
    return parsed.drop_nulls()


def _number(column: pl.Expr) -> pl.Expr:
    number = column.str.strip_chars().cast(pl.Float64, strict=False)
    return pl.when(number.is_finite()).then(number)


def _parse_times(texts: pl.Series) -> pl.Series:
    """Numbers as they are, ISO 8601 text as seconds since 1970, null for anything else."""
    numbers = texts.to_frame("text").select(_number(pl.col("text")))["text"]
    if numbers.null_count() == texts.null_count():
        return numbers
    dates = texts.set(numbers.is_not_null(), None).map_elements(_seconds, return_dtype=pl.Float64)
    return numbers.fill_null(dates)


def _seconds(text: str) -> float | None:
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        return None
    seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    return seconds if math.isfinite(seconds) else None
