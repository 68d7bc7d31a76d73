"""What recommending needs beside a model, kept in a run's folder: titles, the items behind them, users' histories."""

from __future__ import annotations

import difflib
import heapq
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl

from rankwise.errors import UserError, cut, shown
from rankwise.files import check_folder, new_folder, write_json, write_jsonl
from rankwise.reading import read_json, read_parquet
from rankwise.recommend.prompts import Template
from rankwise.recommend.rows import BROKEN, Prepared

STORE = "store"  # of a run's folder
TITLES, HISTORIES, SETTINGS = "titles.parquet", "histories.parquet", "settings.json"
AGAIN = "run its recipe again with --resume"
MOST_COMPARED = 2000  # known names that an unknown one is compared with letter by letter, some 0.1 ms each
CLOSEST = 3  # known names that an unknown one is answered with


class UnknownTitle(UserError):
    """A name that is no title's and no item's.

    Attributes:
        name: as given.
        closest: a few titles that it may have meant, the most alike first; none where none is alike.
    """

    def __init__(self, name: str, known: Collection[str]) -> None:
        self.name, self.closest = name, closest(name, known)
        super().__init__(f"{name!r} is none of the {len(known)} titles; {_hint(self.closest, known)}")


@dataclass(frozen=True, eq=False)
class Store:
    """A catalogue, its users, and how a prompt is made of a history.

    Attributes:
        titles: each ``title`` once, sorted, with its ``popularity`` in training, the ids of its ``items``, and the
            attributes that the template tells.
        histories: each ``user`` with the ``titles`` of all interactions, oldest first, and their ``ratings`` where the
            template tells them.
        template: of the prompts that the model was trained on.
        most_history: titles in a prompt, the latest ones.
        broken: rows of the log that could not be read, for a person to look at; not read back.
    """

    titles: pl.DataFrame
    histories: pl.DataFrame
    template: Template
    most_history: int
    broken: pl.DataFrame = field(default_factory=pl.DataFrame)

    @cached_property
    def items(self) -> dict[str, list[str]]:
        """The ids of the items behind each title."""
        return dict(self.titles.select("title", "items").iter_rows())

    @cached_property
    def about(self) -> dict[str, dict[str, str | None]]:
        """What the template tells of each title."""
        names = self.template.attributes
        if not names:
            return {}
        return {str(row.pop("title")): row for row in self.titles.select("title", *names).iter_rows(named=True)}

    def has_user(self, user: str) -> bool:
        """Whether the log has a user of this name."""
        return user in self._users

    def history(self, user: str) -> list[str]:
        """All titles that a user of the log chose, oldest first.

        Raises:
            UserError: there is no such user.
        """
        place = self._users.get(user)
        if place is None:
            hint = _hint(closest(user, self._users), self._users)
            raise UserError(f"user {user!r} is none of {len(self._users)} in the log; {hint}")
        titles: list[str] = self.histories["titles"][place].to_list()
        return titles

    def ratings(self, user: str) -> list[float | None]:
        """How a user of the log rated each title of the history; nothing where the template does not tell it."""
        if "ratings" not in self.histories.columns:
            return []
        ratings: list[float | None] = self.histories["ratings"][self._users[user]].to_list()
        return ratings

    def find(self, names: Sequence[str]) -> list[str]:
        """The titles that a person means: by title, letters' case aside, or by the id of an item.

        Raises:
            UnknownTitle: a name is none of these; the closest titles are named.
        """
        return [self._find(name) for name in names]

    def _find(self, name: str) -> str:
        if name in self.items:
            return name
        found = self._by_name.get(_plain(name))
        if found is None:
            raise UnknownTitle(name, self.items.keys())
        return found

    @cached_property
    def _users(self) -> dict[str, int]:
        return {user: place for place, user in enumerate(self.histories["user"].to_list())}

    @cached_property
    def _by_name(self) -> dict[str, str]:
        """Titles by what else they are called: a title goes before an id, and the first of several titles wins."""
        ids = {_plain(item): title for title, items in self.items.items() for item in items}
        return ids | {_plain(title): title for title in reversed(self.items)}


def _plain(name: str) -> str:
    return " ".join(name.split()).casefold()


def closest(name: str, known: Iterable[str]) -> list[str]:
    """A few of the known names: the most alike, then those that hold this one; none where none does.

    Of many names those are compared that share most words with this one, or its first letters.
    """
    plain: dict[str, str] = {}
    for one in known:
        plain.setdefault(_plain(one), one)
    wanted = _plain(name)
    words = set(wanted.split())
    near = heapq.nlargest(
        MOST_COMPARED, plain, key=lambda one: len(words.intersection(one.split())) + (one[:3] == wanted[:3])
    )
    close = difflib.get_close_matches(wanted, near, CLOSEST, cutoff=0.5)
    close += [one for one in plain if wanted and wanted in one and one not in close][: CLOSEST - len(close)]
    return [plain[one] for one in close]


def _hint(close: Sequence[str], known: Iterable[str]) -> str:
    if close:
        return f"the closest: {', '.join(map(repr, close))}"
    return f"such as {', '.join(map(repr, islice(known, CLOSEST)))}"


def make_store(prepared: Prepared, template: Template) -> Store:
    """The store of prepared data: every title of the catalogue and of the item list, chosen by somebody or not."""
    popularity = pl.DataFrame(
        {"title": list(prepared.popularity), "popularity": list(prepared.popularity.values())},
        schema={"title": pl.String, "popularity": pl.Int64},
    )
    about = [pl.col(name).first() for name in template.attributes]
    items = prepared.items.group_by("title", maintain_order=True).agg(pl.col("item").sort().alias("items"), *about)
    titles = (
        pl.concat([prepared.items["title"], pl.Series("title", prepared.catalogue, dtype=pl.String)])
        .unique()
        .sort()
        .to_frame()
        .join(popularity, on="title", how="left")
        .join(items, on="title", how="left")
        .with_columns(pl.col("popularity").fill_null(0), pl.col("items").fill_null([]))
    )
    return Store(titles, prepared.histories, template, prepared.most_history, prepared.broken)


def write_store(folder: Path, store: Store) -> None:
    """Write a store; the folder appears whole or not at all, in place of one that was there."""
    with new_folder(folder) as made:
        store.titles.write_parquet(made / TITLES)
        store.histories.write_parquet(made / HISTORIES)
        if store.broken.height:
            write_jsonl(made / BROKEN, store.broken.iter_rows(named=True))
        write_json(made / SETTINGS, {"most_history": store.most_history, "template": asdict(store.template)})


def read_store(folder: Path) -> Store:
    """Read what :func:`write_store` wrote.

    Raises:
        UserError: the folder is not there, or one of its files is missing or damaged.
    """
    for name in (SETTINGS, TITLES, HISTORIES):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} has no {name}: recommendations need a finished run on interactions or published lists"
            )
    check_folder(folder)
    settings = read_json(folder / SETTINGS, dict, AGAIN)
    titles, histories = (read_parquet(folder / name, AGAIN) for name in (TITLES, HISTORIES))
    try:
        template = Template(**{name: str(value) for name, value in settings["template"].items()})
        template.render(["a title"], about={}), template.render_answer("a title")
        told = dict.fromkeys(template.attributes, pl.String)
        _check(titles, {"title": pl.String, "items": pl.List(pl.String), **told})
        _check(histories, {"user": pl.String, "titles": pl.List(pl.String)})
        titles = titles.with_columns(pl.col("popularity").cast(pl.Int64))
        return Store(titles, histories, template, _count(settings["most_history"]))
    except (ValueError, LookupError, TypeError, AttributeError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{folder} is damaged ({cut(str(error), 200)}): {AGAIN}") from error


def _check(table: pl.DataFrame, columns: Mapping[str, Any]) -> None:
    """See that a table has these columns, and in the first of them a name for each row."""
    for name, kind in columns.items():
        if table.schema.get(name) != kind:
            raise ValueError(f"there is no column {name} of {kind}")
    name = next(iter(columns))
    if table[name].null_count() or table[name].is_duplicated().any():
        raise ValueError(f"a {name} is missing, or is there twice")


def _count(value: object) -> int:
    """A whole number from 0."""
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{shown(value)} is no count")
    return value
