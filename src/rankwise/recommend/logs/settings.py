"""What a log is, and what is to become of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rankwise.recommend.logs.interactions import InteractionColumns
from rankwise.recommend.logs.items import ItemColumns
from rankwise.recommend.logs.reading import Form
from rankwise.recommend.splits import SplitSettings


@dataclass(frozen=True, kw_only=True)
class LogSettings(SplitSettings):
    """What a log is, and what is to become of it."""

    ratings: Path  # the log: a file or a folder of files
    items: Path | None = None  # item ids and titles; without it the log's items are titles themselves
    rating_columns: InteractionColumns = field(default_factory=InteractionColumns)
    item_columns: ItemColumns | None = None
    rating_form: Form | None = None  # how the files are written; by default as their suffixes say
    item_form: Form | None = None
    quoting: bool = True  # whether quotes enclose the fields of CSV and TSV files
    tidy_titles: bool = False  # "Matrix, The (1999)" becomes "The Matrix (1999)"
    minimum_rating: float | None = None  # interactions rated lower are left out
    core: int = 1  # users and items with fewer interactions than this are left out, until there are none
    session_gap: float | None = None  # seconds without an interaction after which a user's next session begins
    rows_in_memory: int = 4_000_000  # interactions that are worked on together
    attributes: tuple[str, ...] = ()  # further columns of the items, for the template
    ratings_shown: bool = False  # whether the template tells ratings
