"""Logs in the form that their authors publish them in: which file holds what, and how it is written.

The files are the user's: nothing is downloaded. Sources of the forms: GroupLens (MovieLens, HetRec 2011 LastFM),
Celma (LastFM 1K), McAuley's group at UCSD (Steam) and the UCSD Book Graph (Goodreads).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rankwise.errors import UserError, nearest
from rankwise.recommend.logs.interactions import InteractionColumns
from rankwise.recommend.logs.items import ItemColumns
from rankwise.recommend.logs.reading import Form
from rankwise.recommend.logs.reading.forms import COMPRESSED

_GENRES = tuple("unknown action adventure animation children comedy crime documentary drama fantasy film_noir horror "
                "musical mystery romance sci_fi thriller war western".split())  # fmt: skip


@dataclass(frozen=True)
class KnownLog:
    """A published log.

    Attributes:
        interactions: names that the file may have, with * for any letters, and maybe ``.gz`` or ``.zst`` at the end.
        columns: of it.
        form: of it; by default what the suffix says.
        items: the file of items, likewise; none where the items of the log are titles.
        item_columns: of it, where there is one.
        item_form: of it.
    """

    interactions: tuple[str, ...]
    columns: InteractionColumns
    form: Form | None = None
    items: tuple[str, ...] = ()
    item_columns: ItemColumns | None = None
    item_form: Form | None = None


_JSON, _LITERALS = Form(), Form(literals=True)
_DATES = "%a %b %d %H:%M:%S %z %Y"  # Mon Mar 26 15:50:44 -0700 2012
_PLAYS = ("user", "time", "artist_id", "artist", "track_id", "track")
_RATED = InteractionColumns("user", "item", "time", "rating")

KNOWN_LOGS = {
    "movielens-100k": KnownLog(
        ("u.data",),
        _RATED,
        Form("\t", names=("user", "item", "rating", "time")),
        ("u.item",),
        ItemColumns("item", "title"),
        Form("|", ("item", "title", "released", "released_on_video", "imdb", *_GENRES), "latin-1", quoting=False),
    ),
    "movielens-1m": KnownLog(
        ("ratings.dat",),
        _RATED,
        Form("::", names=("user", "item", "rating", "time")),
        ("movies.dat",),
        ItemColumns("item", "title", ("genres",)),
        Form("::", names=("item", "title", "genres"), encoding="latin-1"),
    ),
    "movielens": KnownLog(
        ("ratings.csv",),
        InteractionColumns("userId", "movieId", "timestamp", "rating"),
        items=("movies.csv",),
        item_columns=ItemColumns("movieId", "title", ("genres",)),
    ),
    "lastfm-1k": KnownLog(
        ("userid-timestamp-artid-artname-traid-traname.tsv",),
        InteractionColumns("user", "artist", "time"),
        Form("\t", names=_PLAYS, quoting=False),
    ),
    "lastfm-2k": KnownLog(
        ("user_taggedartists-timestamps.dat",),
        InteractionColumns("userID", "artistID", "timestamp"),
        Form("\t"),
        ("artists.dat",),
        ItemColumns("id", "name"),
        Form("\t", quoting=False),
    ),
    "steam": KnownLog(
        ("steam_reviews.json", "steam_new.json"),
        InteractionColumns("username", "product_id", "date"),
        _LITERALS,
        ("steam_games.json",),
        ItemColumns("id", "title"),
        _LITERALS,
    ),
    "goodreads": KnownLog(
        ("goodreads_interactions*.json",),
        InteractionColumns("user_id", "book_id", "date_added", "rating", time_form=_DATES),
        _JSON,
        ("goodreads_books*.json",),
        ItemColumns("book_id", "title"),
        _JSON,
    ),
}


def known_log(name: str, folder: Path) -> tuple[KnownLog, Path, Path | None]:
    """A form by name, and the files of a folder that it is about.

    Raises:
        UserError: there is no such form, or one of its files is missing.
    """
    if name not in KNOWN_LOGS:
        raise UserError(f"unknown form of a log {name!r}; {nearest(name, KNOWN_LOGS)}")
    known = KNOWN_LOGS[name]
    items = _find(folder, known.items, name) if known.items else None
    return known, _find(folder, known.interactions, name), items


def _find(folder: Path, names: tuple[str, ...], form: str) -> Path:
    found = sorted(path for name in names for end in ("", *COMPRESSED) for path in folder.glob(f"{name}{end}"))
    if len(found) != 1:
        said = ", ".join(path.name for path in found) or "no such file"
        raise UserError(f"{folder}: a log of the form {form} has one file {' or '.join(names)}; found: {said}")
    return found[0]
