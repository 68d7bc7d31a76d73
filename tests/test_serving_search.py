"""Titles while typing: an independent, slower ranking finds the same; the order is worked by hand."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rankwise.serving.title_search import TitleSearch, plain

TITLES = {
    "Heat (1995)": 5,
    "Body Heat (1981)": 7,
    "The Heat": 9,
    "Wheat": 100,
    "Amélie": 3,
    "Spider-Man 2": 4,
    "Spider-Man": 4,
    "In the Heat of the Night": 2,
    "???": 1,
    "東京物語": 1,
    "<script>alert(1)</script>": 1,
    "Straße": 1,
}
SEARCH = TitleSearch(list(TITLES), list(TITLES.values()))


def test_beginnings_go_before_words_before_parts_before_scattered_words() -> None:
    assert SEARCH.find("heat", 10) == [
        "Heat (1995)",
        "The Heat",
        "Body Heat (1981)",
        "In the Heat of the Night",
        "Wheat",
    ]
    assert SEARCH.find("heat body", 10) == ["Body Heat (1981)"]
    assert SEARCH.find("heat", 2) == ["Heat (1995)", "The Heat"]


def test_case_accents_and_punctuation_do_not_matter() -> None:
    assert SEARCH.find("  AMELIE ", 5) == SEARCH.find("amé", 5) == ["Amélie"]
    assert SEARCH.find("spider man", 5) == SEARCH.find("Spider-man", 5) == ["Spider-Man", "Spider-Man 2"]
    assert SEARCH.find("strasse", 5) == ["Straße"]
    assert SEARCH.find("京物", 5) == ["東京物語"]
    assert SEARCH.find("<script>", 5) == ["<script>alert(1)</script>"]


def test_titles_and_queries_without_letters() -> None:
    assert SEARCH.find("???", 5) == ["???"]
    assert SEARCH.find("!!!", 5) == []
    assert SEARCH.find("", 3) == SEARCH.find("  ", 3) == ["Wheat", "The Heat", "Body Heat (1981)"]


@given(st.text(max_size=6), st.integers(1, 20))
def test_all_that_fit_are_found_and_nothing_else(query: str, limit: int) -> None:
    wanted = plain(query).split()
    fitting = {title for title in TITLES if all(word in plain(title) for word in wanted)}
    found = SEARCH.find(query, len(TITLES))
    assert set(found) == fitting and len(found) == len(fitting)
    assert SEARCH.find(query, limit) == found[:limit]
