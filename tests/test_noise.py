"""Mistakes in texts: what they change, how often, and what stays."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.errors import UserError
from rankwise.tasks.noise import NOISES, with_noise

WORDS = [f"word{'abcdefghij'[number % 10] * (number % 5)}" for number in range(4000)]
TEXT = " ".join(WORDS)


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=60), st.sampled_from(sorted(NOISES)), st.floats(0, 1), st.integers(0, 5))
def test_any_text_has_the_same_noise_each_time(text: str, kind: Any, share: float, seed: int) -> None:
    made = with_noise(text, kind, share, seed, 3)
    assert made == with_noise(text, kind, share, seed, 3)
    assert with_noise(text, kind, 0.0, seed, 3) == " ".join(text.split())
    assert bool(made) == bool(text.split())


def test_words_get_one_mistake_at_the_given_rate() -> None:
    made = with_noise(TEXT, "characters", 0.2, 0, 1).split()
    changed = [(before, after) for before, after in zip(WORDS, made, strict=True) if before != after]
    assert 0.18 < len(changed) / len(WORDS) < 0.22
    for before, after in changed:
        assert after[0] == before[0]
        assert abs(len(after) - len(before)) <= 1
        assert sum(((Counter(before) - Counter(after)) + (Counter(after) - Counter(before))).values()) <= 1
    assert with_noise("a of the 1234 --", "characters", 1.0, 0, 1) == "a of the 1234 --"


def test_words_are_dropped_and_swapped_at_the_given_rate() -> None:
    numbered = [str(number) for number in range(4000)]
    dropped = with_noise(" ".join(numbered), "dropped-words", 0.3, 0, 1).split()
    assert 0.68 < len(dropped) / 4000 < 0.72
    assert dropped == sorted(dropped, key=int)
    swapped = [int(word) for word in with_noise(" ".join(numbered), "swapped-words", 0.3, 0, 1).split()]
    assert sorted(swapped) == list(range(4000))
    moves = [value - place for place, value in enumerate(swapped)]
    assert set(moves) == {-1, 0, 1}
    assert 0.2 < moves.count(1) / 4000 < 0.26  # 0.3 of those that have not moved: 0.3 / 1.3 of all
    assert with_noise("a b", "dropped-words", 1.0, 0, 1) in ("a", "b")


def test_texts_differ_in_their_mistakes_by_number_and_seed() -> None:
    made = {with_noise(TEXT, "characters", 0.1, seed, number) for seed in range(3) for number in range(3)}
    assert len(made) == 9


def test_what_is_not_possible_is_refused() -> None:
    with pytest.raises(UserError, match="noise 'character' is unknown"):
        with_noise("a", "character", 0.1, 0, 0)
    with pytest.raises(UserError, match=r"a share of 1\.5 is not possible"):
        with_noise("a", "characters", 1.5, 0, 0)
