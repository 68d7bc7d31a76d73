from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from rankwise.errors import UserError
from rankwise.recommend import (
    InteractionSettings,
    SyntheticSettings,
    popularity_scores,
    prepare_interactions,
    ranking_metrics,
    read_interactions,
    synthetic_log,
    target_places,
    write_synthetic,
)


def predecessor(title: str) -> str | None:
    """The part before this one: "X 3" follows "X 2" follows "X"."""
    first, _, part = title.rpartition(" ")
    if not part.isdecimal():
        return None
    return first if part == "2" else f"{first} {int(part) - 1}"


def test_size_seeds_and_uniqueness() -> None:
    log, items = synthetic_log()
    assert (items.height, log["user"].n_unique()) == (248, 300)
    assert items["title"].is_unique().all()
    assert log.select("user", "item").is_unique().all()
    assert log["rating"].is_between(1, 5).all()
    assert 13.5 < log.height / 300 < 14.5
    assert synthetic_log()[0].equals(log)
    assert not synthetic_log(SyntheticSettings(seed=1))[0].equals(log)


def test_more_users_change_nothing_for_the_first() -> None:
    few, many = (synthetic_log(SyntheticSettings(users=users))[0] for users in (20, 40))
    assert many.head(few.height).equals(few)


def test_a_title_is_inside_another_only_as_an_earlier_part() -> None:
    titles = synthetic_log()[1]["title"].to_list()
    inside = [(a, b) for a in titles for b in titles if a != b and a.lower() in b.lower()]
    assert inside
    assert all(b.startswith(f"{a} ") and b[len(a) + 1 :].isdecimal() for a, b in inside)


def test_parts_are_seen_in_order_and_time_grows() -> None:
    log, items = synthetic_log()
    titled = log.join(items, on="item", maintain_order="left")
    for _, rows in titled.group_by("user", maintain_order=True):
        assert rows["timestamp"].is_sorted()
        titles = rows["title"].to_list()
        for place, title in enumerate(titles):
            before = predecessor(title)
            assert before is None or before in titles[:place]


def test_a_reader_of_titles_beats_popularity_by_far(tmp_path: Path) -> None:
    ratings, items = write_synthetic(tmp_path)
    prepared = prepare_interactions(InteractionSettings(ratings=ratings, items=items))
    genres = dict(pl.read_csv(items).select("title", "genres").rows())

    def reader(row: dict[str, list[str]]) -> np.ndarray:
        """The next part of a series that was begun, else the genre seen most often in the history."""
        liked = {title: sum(genres[past] == genres[title] for past in row["history"]) for title in row["candidates"]}
        known = [(title, predecessor(title)) for title in row["candidates"]]
        return np.array([100.0 * (b in row["history"]) + liked[t] * (b is None) for t, b in known])

    candidates = [row["candidates"] for row in prepared.test]
    places = target_places(candidates, [row["target"] for row in prepared.test])
    popular = ranking_metrics(popularity_scores(candidates, prepared.popularity), places)
    read = ranking_metrics([reader(row) for row in prepared.test], places)
    assert popular["HR@1"] > 0.06
    assert read["HR@1"] > 0.45 > 3 * popular["HR@1"]
    assert prepared.counts["test cases that cannot be won by substring"] == 0


def test_the_files_are_read_as_a_users_own(tmp_path: Path) -> None:
    ratings, items = write_synthetic(tmp_path, SyntheticSettings(users=30))
    log, counts = read_interactions(ratings)
    made, titles = synthetic_log(SyntheticSettings(users=30))
    assert log["item"].to_list() == made["item"].to_list()
    assert counts["unparsable rows"] == counts["duplicate interactions"] == 0
    assert pl.read_csv(items).equals(titles)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SyntheticSettings(users=0), "users = 0"),
        (SyntheticSettings(series=40, singles=40), "series . singles = 80: between 1 and 48"),
        (SyntheticSettings(series=1, singles=0, parts=1), "8 films are too few"),
    ],
)
def test_impossible_settings_are_refused(settings: SyntheticSettings, message: str) -> None:
    with pytest.raises(UserError, match=message):
        synthetic_log(settings)
