"""ROUGE: how much of a reference's words a written text has, in pairs and in order."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

WORD = re.compile(r"[^\W_]+")
Measures = dict[str, float]


def rouge(written: str, reference: str) -> Measures:
    """F1 of shared words (ROUGE-1), pairs of neighbours (ROUGE-2) and the longest common subsequence (ROUGE-L).

    Words are runs of letters and digits, in lower case, of any script; nothing is stemmed. With n shared units, of w
    in the written text and r in the reference, F1 = 2 n / (w + r); 0 where either has none.

    Source: Lin, ROUGE: A package for automatic evaluation of summaries, 2004. It is our own for want of a library
    that is still kept: the one in common use has had no release since 2022, and takes Latin letters alone for words.
    """
    one, other = (WORD.findall(text.lower()) for text in (written, reference))
    found = {f"ROUGE-{size}": _shared(_runs(one, size), _runs(other, size)) for size in (1, 2)}
    return found | {"ROUGE-L": _f1(longest_common(one, other), len(one), len(other))}


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
