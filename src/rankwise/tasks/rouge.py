"""ROUGE: how much of a reference's words a written text has, in pairs and in order."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache

# Scripts without spaces between words: Thai and Lao, Burmese, Khmer, Japanese and Chinese.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
Measures = dict[str, float]


def rouge(written: str, reference: str) -> Measures:
    """F1 of shared words (ROUGE-1), pairs of neighbours (ROUGE-2) and the longest common subsequence (ROUGE-L).

    What a word is, :func:`words` says. With n shared units, of w in the written text and r in the reference,
    F1 = 2 n / (w + r); 0 where either has none.

    Source: Lin, ROUGE: A package for automatic evaluation of summaries, 2004. It is our own for want of a library
    that is still kept: the one in common use has had no release since 2022, and takes Latin letters alone for words.
    """
    one, other = map(words, (written, reference))
    found = {f"ROUGE-{size}": _shared(_runs(one, size), _runs(other, size)) for size in (1, 2)}
    return found | {"ROUGE-L": _f1(longest_common(one, other), len(one), len(other))}


def words(text: str) -> list[str]:
    """Runs of letters and digits with their marks (accents, vowel signs), in lower case; nothing is stemmed.

    In scripts without spaces between words (Chinese, Japanese, Thai, Lao, Burmese, Khmer) each letter is one, with its
    marks.
    """
    return _pattern().findall(text.lower())


@cache
def _pattern() -> re.Pattern[str]:
    # Not the variation selectors, which are marks too: they follow emoji, and the digits of some.
    codes = (*range(0x300, 0xFE00), *range(0x10000, 0x1F000))
    marks = "".join(chr(code) for code in codes if unicodedata.category(chr(code)) in ("Mn", "Mc"))
    letters = rf"[^\W_{UNSPACED}]+"
    joined = rf"(?:[{marks}]+[\u200c\u200d]?{letters})*"  # what follows a joiner of Indic scripts is the same word
    return re.compile(rf"(?=\w)[{UNSPACED}][{marks}]*|{letters}{joined}[{marks}]*")


def _runs(words: Sequence[str], size: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[start:] for start in range(size)), strict=False))


def _shared(one: Counter[tuple[str, ...]], other: Counter[tuple[str, ...]]) -> float:
    return _f1((one & other).total(), one.total(), other.total())


def _f1(shared: int, written: int, reference: int) -> float:
    return 2 * shared / (written + reference) if shared else 0.0


def longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence, by the usual table of two rows."""
    row = [0] * (len(other) + 1)
    for word in one:
        corner = 0
        for place, match in enumerate(other, start=1):
            above = row[place]
            row[place] = corner + 1 if word == match else max(above, row[place - 1])
            corner = above
    return row[-1]
