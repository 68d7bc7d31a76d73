"""A finished run as a recommender: for a user of its log, for a history, or for everybody."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from rankwise.errors import UserError
from rankwise.evaluation import open_run, trained_stage
from rankwise.files import MANIFEST, file_digest
from rankwise.models import context_limit, load_tokenizer
from rankwise.recommend.batch import Part, open_parts, recommend_users, write_part
from rankwise.recommend.cluster import over_cluster
from rankwise.recommend.recommender import Ranking, Recommender
from rankwise.recommend.store import STORE, read_store
from rankwise.saying import say


def load_recommender(
    run: str | Path, stage: str | None = None, *, users: Iterable[str] = (), titles: Sequence[str] = ()
) -> Recommender:
    """The recommender that a run trained, from what its folder keeps: its data may be gone.

    Args:
        run: the run's folder.
        stage: whose adapter to take; the last one's where None.
        users: who must be in its log, which is looked up before the model is loaded.
        titles: names of titles, likewise.

    Raises:
        UserError: it is no finished run on interactions or published lists, or has no such stage, user or title.
    """
    run = Path(run)
    recipe = open_run(run)
    store = read_store(run / STORE)
    for user in users:
        store.history(user)
    store.find(titles)
    tokenizer = load_tokenizer(recipe.model.path)
    model = trained_stage(run, recipe, stage)
    return Recommender(model, tokenizer, store, context_limit(recipe.model, tokenizer, recipe.virtual_tokens))


def recommend_once(
    recommender: Recommender,
    console: Console,
    *,
    user: str | None,
    history: Sequence[str] | None,
    candidates: Sequence[str] | None,
    top: int,
    **options: Any,
) -> dict[str, Any]:
    """Show the best titles for a user of the log or for a history; out of candidates, where some are given."""
    store = recommender.store
    titles = store.history(str(user)) if history is None else store.find(history)
    ratings = store.ratings(str(user)) if history is None else []
    if candidates is None:
        [ranking] = recommender.recommend([titles], top, ratings=[ratings], **options)
    else:
        normalised = bool(options.get("length_normalised"))
        ranking = recommender.rank(titles, candidates, top, ratings, length_normalised=normalised)
    _say(recommender.counts, console)
    console.print(ranking_table(ranking))
    if not ranking.exact:
        say(console, "the search was cut short: other titles may be better", dim=True)
    return {
        "user": user,
        "history": list(titles),
        "exact": ranking.exact,
        "recommendations": [one._asdict() for one in ranking.best],
    }


def ranking_table(ranking: Ranking) -> Table:
    """A console table of a ranking."""
    table = Table(box=SIMPLE_HEAD, padding=0, show_edge=False)
    for name in ("rank", "title", "items", "log-probability"):
        table.add_column(name, justify="left" if name in ("title", "items") else "right", overflow="fold")
    for rank, one in enumerate(ranking.best, start=1):
        table.add_row(str(rank), Text(one.title), Text(", ".join(one.items)), f"{one.score:.3f}")
    return table


def asked_of(run: Path, stage: str | None) -> dict[str, Any]:
    """What a folder of recommendations is of: a run and its stage, and what these hold, in SHA-256 of manifests."""
    made = [*run.glob(f"stages/{glob.escape(stage) if stage else '*'}/{MANIFEST}"), run / STORE / MANIFEST]
    digests = {path.parent.relative_to(run).as_posix(): file_digest(path) for path in sorted(made) if path.is_file()}
    return {"run": str(run), "stage": stage, "digests": digests}


def recommend_to_folder(
    recommender: Recommender,
    folder: Path,
    console: Console,
    *,
    users: Sequence[str] | None,
    settings: dict[str, Any],
    cluster: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Recommend to the users that are named, or to all of the log, into a folder of Parquet files.

    Args:
        recommender: of the run.
        folder: see :func:`rankwise.recommend.batch.recommend_users`.
        console: to say how far it is.
        users: none for all of the log.
        settings: of :func:`asked_of`.
        cluster: whether the workers of a Ray cluster do it, each with a model of its own.
        **options: of :meth:`Recommender.recommend`.
    """
    named = recommender.store.histories["user"].to_list() if users is None else list(dict.fromkeys(users))
    if not named:
        raise UserError("there is no user to recommend to: the run's data has none, or the list of users is empty")
    columns = (TextColumn("users"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    counts: Counter[str] = Counter()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("users", total=len(named))
        if cluster:
            work = partial(_write_elsewhere, settings["run"], settings["stage"], options)
            parts = open_parts(recommender, named, folder.resolve(), settings | options)
            for part, found in zip(parts, over_cluster(work, parts, models=True), strict=True):
                counts += found
                if not part.path.is_file():
                    raise UserError(f"{part.path} is not there: all machines of the cluster must see its folder")
                bar.advance(task, len(part.users))
        else:
            for done in recommend_users(recommender, named, folder, settings, **options):
                bar.update(task, completed=done)
    counts += Counter(recommender.counts)
    _say(counts, console)
    say(console, f"recommendations: {folder}: {len(named)} users")
    return {"folder": str(folder), "users": len(named)}


def _write_elsewhere(run: str, stage: str | None, options: dict[str, Any], part: Part) -> Counter[str]:
    """Write a part in a worker's process, and count what its recommender counted."""
    recommender = _loaded(run, stage)
    before = Counter(recommender.counts)
    list(write_part(recommender, part, **options))
    return Counter(recommender.counts) - before


_loaded = lru_cache(maxsize=1)(load_recommender)  # a worker keeps its model from one part to the next


def _say(counts: Mapping[str, int], console: Console) -> None:
    for name, number in counts.items():
        if number:
            say(console, f"  {name}: {number}", dim=True)
