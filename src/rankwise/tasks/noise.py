"""Texts with the mistakes that people make: to see whether a model's answers survive them."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Literal, get_args

from rankwise.errors import UserError, nearest

Noise = Literal["characters", "dropped-words", "swapped-words"]
LEAST = 4  # letters of a word that gets a typing mistake


def with_noise(text: str, kind: str, share: float, seed: int, number: int) -> str:
    """A text with mistakes, the same ones for the same arguments; spaces between words become single.

    - ``characters``: each word of four letters or more gets one typing mistake with probability ``share``: two
      neighbours within it change places, one is left out, or one is doubled; its first letter stays.
    - ``dropped-words``: each word is left out with probability ``share``; one at least stays.
    - ``swapped-words``: each word changes places with the next one with probability ``share``; no word moves twice.

    Args:
        text: any.
        kind: of mistakes.
        share: 0 to 1.
        seed: of the run.
        number: of the text, so that equal ones differ.

    Raises:
        UserError: the kind is unknown, or the share out of its range.

    Source: Belinkov and Bisk (arXiv 1711.02173), whose synthetic noise swaps letters within words, for the first; Wei
        and Zou (arXiv 1901.11196) for words that are dropped and swapped.
    """
    if kind not in get_args(Noise):
        raise UserError(f"noise {kind!r} is unknown: {nearest(kind, get_args(Noise))}")
    if not 0 <= share <= 1:
        raise UserError(f"a share of {share} is not possible: it is from 0 to 1")
    generator = random.Random(f"{seed}:noise:{kind}:{number}")
    return " ".join(NOISES[kind](text.split(), share, generator))


def _characters(words: list[str], share: float, generator: random.Random) -> list[str]:
    return [_mistyped(word, generator) if generator.random() < share else word for word in words]


def _mistyped(word: str, generator: random.Random) -> str:
    letters = [found.start() for found in re.finditer(r"[^\W\d_]", word)]
    if len(letters) < LEAST:
        return word
    place = generator.choice(letters[1:-1])
    after = place + 1
    ways = [word[:place] + word[after:], word[:after] + word[place:]]
    if word[place] != word[after]:
        ways.append(word[:place] + word[after] + word[place] + word[after + 1 :])
    return generator.choice(ways)


def _dropped(words: list[str], share: float, generator: random.Random) -> list[str]:
    kept = [word for word in words if generator.random() >= share]
    return kept or ([generator.choice(words)] if words else [])


def _swapped(words: list[str], share: float, generator: random.Random) -> list[str]:
    made, place = list(words), 0
    while place < len(made) - 1:
        moves = generator.random() < share
        if moves:
            made[place], made[place + 1] = made[place + 1], made[place]
        place += 1 + moves
    return made


NOISES: dict[str, Callable[[list[str], float, random.Random], list[str]]] = {
    "characters": _characters,
    "dropped-words": _dropped,
    "swapped-words": _swapped,
}
