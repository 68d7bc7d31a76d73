"""The rows of `preference_study.py`: windows for supervised training, others for preferences, and cases to measure.

Windows of one user (LastFM: of one session) overlap, so that whole users go to one or the other side: what is trained
on with preferences is new to a model that was fine-tuned on its own side, or, as ``seen``, is not.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rankwise.files import write_text
from rankwise.recommend import (
    InteractionSettings,
    Prepared,
    PublishedSettings,
    load_template,
    prepare_interactions,
    prepare_published,
)
from rankwise.sampling import sample

Row = dict[str, Any]
TEMPLATES = {"lastfm": ("artists", "artists-candidates"), "movielens": ("films", "films-candidates")}
CANDIDATES = 20
SUPERVISED = 0.7  # share of the users
PREFERENCES = 8000  # rows to draw from, new ones and seen ones
CASES = 800  # of validation, at most
HISTORY = 5  # films in a prompt, at most: titles are long


class Rows(NamedTuple):
    """Everything that a run may need.

    Attributes:
        supervised: rows of ``prompt`` and ``chosen``.
        fresh: rows of ``prompt``, ``chosen``, ``rejected`` (19 texts) and ``user``, of users that ``supervised`` lacks.
        seen: such rows of users that ``supervised`` has.
        validation: cases of ``prompt``, ``candidates`` and ``target``.
        test: such cases.
        met: of each user of ``fresh`` and ``seen``, the answers that are in its windows.
        catalogue: all answers, and how often each occurs in training.
    """

    supervised: list[Row]
    fresh: list[Row]
    seen: list[Row]
    validation: list[Row]
    test: list[Row]
    met: dict[str, list[str]]
    catalogue: dict[str, int]


def template_of(data: str, listed: bool) -> str:
    return TEMPLATES[data][listed]


def load(data: str, listed: bool, work: Path) -> Rows:
    """The rows with one of the two templates; prepared once, and kept in the folder."""
    path = work / "rows" / f"{template_of(data, listed)}.json"
    if not path.exists():
        made = _split(prepared_rows(data, listed), data, listed)
        write_text(path, json.dumps(made._asdict(), ensure_ascii=False))
    return Rows(**json.loads(path.read_text(encoding="utf-8")))


def drawn(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """``count`` rows in an order of the seed's; fewer are the first of more."""
    if count > len(rows):
        raise SystemExit(f"{count} rows are wanted, and there are {len(rows)}")
    return random.Random(f"{seed}:order").sample(list(rows), len(rows))[:count]


def prepared_rows(data: str, listed: bool) -> Prepared:
    """Both as `preference_study.py` reads them."""
    folder = Path(os.environ.get("RANKWISE_DATA", "../shared/data"))
    common: dict[str, Any] = {"template": template_of(data, listed), "negatives": CANDIDATES - 1}
    if data == "lastfm":
        files = {"train": "llara/train_data.jsonl", "names": "llara/id2name.txt"}
        files |= {"validation": "lastfm-val.json", "test": "lastfm-test.json"}
        paths = {name: folder / "lastfm" / file for name, file in files.items()}
        return prepare_published(PublishedSettings(**paths, **common))
    ratings, items = (folder / "ml-latest-small" / f"{name}.csv" for name in ("ratings", "movies"))
    common |= {"minimum_rating": 3.0, "tidy_titles": True, "history": HISTORY}
    return prepare_interactions(InteractionSettings(ratings=ratings, items=items, **common))


def _split(prepared: Prepared, data: str, listed: bool) -> Rows:
    answer = load_template(template_of(data, listed)).render_answer
    users = _users(prepared.train, data)
    met: dict[str, dict[str, None]] = {user: {} for user in users}
    for user, row in zip(users, prepared.train, strict=True):
        met[user] |= dict.fromkeys(map(answer, (*row["history"], row["target"])))
    shuffled = random.Random("users").sample(sorted(met), len(met))
    supervised = set(shuffled[: round(SUPERVISED * len(shuffled))])
    sides: dict[bool, list[Row]] = {True: [], False: []}
    for user, row in zip(users, prepared.train, strict=True):
        sides[user in supervised].append(_picked(row, "prompt", "chosen", "rejected") | {"user": user})
    fresh, seen = (sample(sides[side], PREFERENCES, 0)[0] for side in (False, True))
    parts = (prepared.validation, prepared.test)
    validation, test = ([_picked(row, "prompt", "candidates", "target") for row in part] for part in parts)
    return Rows(
        supervised=[_picked(row, "prompt", "chosen") for row in sides[True]],
        fresh=fresh,
        seen=seen,
        validation=sample(validation, CASES, 0)[0],
        test=test,
        met={user: list(met[user]) for user in sorted({row["user"] for row in (*fresh, *seen)})},
        catalogue={answer(title): prepared.popularity.get(title, 0) for title in prepared.catalogue},
    )


def _picked(row: Row, *names: str) -> Row:
    return {name: row[name] for name in names}


def _users(rows: Sequence[Row], data: str) -> list[str]:
    """Of each row its user; of LastFM its session, whose windows follow one another and begin with 3 artists."""
    if data == "movielens":
        return [row["user"] for row in rows]
    session, found = 0, []
    for row in rows:
        session += len(row["history"]) == 3
        found.append(str(session))
    return found
