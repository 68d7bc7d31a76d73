"""What the columns of a result mean, which way is better, and how a value is written."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Number = int | float  # JSON writes a whole loss as an integer
Better = Literal["higher", "lower"]
UNKNOWN = "as the evaluation names it."
ABSENT = "–"  # noqa: RUF001 - a dash for readers


@dataclass(frozen=True)
class Column:
    """A column of results: its definition in a sentence, which way is better, whether it is a percentage."""

    meaning: str
    better: Better | None = "higher"
    percent: bool = False


_RANKED = "of the candidates, as the row ranks them: a model by the log-probability of their titles."
_DECODED = "where an answer is decoded greedily and is valid if it holds exactly one candidate's title"

# The first pattern that is found in the lower-cased name counts; {k} is the name's number after "@".
_COLUMNS: tuple[tuple[str, Column], ...] = (
    (  # first, as what stands before it is the name of a text or a task
        r"\b(loss|nats)$",
        Column(
            "mean negative log-probability of the held-out tokens, in nats per token; "
            "where rows have prompts, of the answer tokens only.",
            "lower",
        ),
    ),
    (r"\bperplexity$", Column("exponential of the mean loss in nats per token.", "lower")),
    (
        r"(hr|hit rate)@(?P<k>\d+) full",
        Column(
            "share of cases with the true item among the first {k} of the whole catalogue, the user's own left out."
        ),
    ),
    (
        r"ndcg@(?P<k>\d+) full",
        Column("mean of 1 / log2(1 + place of the true item in the whole catalogue), counted as 0 beyond place {k}."),
    ),
    (r"mrr full", Column("mean of 1 / place of the true item in the whole catalogue.")),
    (r"coverage@(?P<k>\d+)", Column("share of the catalogue that is among the first {k} of at least one case.", None)),
    (
        r"novelty@(?P<k>\d+)",
        Column("mean of -log2 of a title's share of all interactions, in bits, over the first {k} of all cases.", None),
    ),
    (
        r"popularity lift@(?P<k>\d+)",
        Column("how much more popular the first {k} are than the users' own histories: 0 as much, 1 twice.", None),
    ),
    (
        r"hr@1\b.*\bvalid",
        Column(
            f"share of right answers among the valid ones, {_DECODED}. "
            "To be read beside the share of valid answers: where they are few, chance makes it large."
        ),
    ),
    (
        r"hr@1\b.*\b(all|greedy|generated|decoded)",
        Column(f"share of right answers among all cases, {_DECODED}; one that is not counts as wrong."),
    ),
    (r"\bvalid", Column(f"share of valid answers, {_DECODED}.", percent=True)),
    (r"(hr|hit rate|hits?|recall)@1\b", Column(f"share of cases with the true item first {_RANKED}")),
    (
        r"(hr|hit rate|hits?|recall)@(?P<k>\d+)",
        Column(f"share of cases with the true item among the first {{k}} {_RANKED}"),
    ),
    (
        r"ndcg@(?P<k>\d+)",
        Column("mean of 1 / log2(1 + place of the true item), counted as 0 beyond place {k}."),
    ),
    (r"\bmrr\b|reciprocal rank", Column("mean of 1 / place of the true item.")),
    (r"mean (rank|place)", Column("mean place of the true item; 1 is first.", "lower")),
    (
        r"\breward accuracy\b",
        Column(
            "share of cases whose right answer gained more log-probability over the base than others.", percent=True
        ),
    ),
    (
        r"\baccuracy per token\b",
        Column("share of cases whose right answer has the largest mean log-probability of a token.", percent=True),
    ),
    (r"\banswered\b", Column("share of cases whose answer could be found in what was written.", percent=True)),
    (r"\baccuracy\b", Column("share of cases answered right.", percent=True)),
    (r"\bexact match\b", Column("share of cases whose answer equals the reference.", percent=True)),
    (
        r"\bf1\b",
        Column("harmonic mean of precision and recall: of the second of two labels, or the mean over more."),
    ),
    (r"\b(matthews|mcc)\b", Column("Matthews correlation of predicted and true labels; 0 is chance.")),
    (r"\bpearson", Column("Pearson correlation of predicted and true scores.")),
    (r"\bspearman", Column("Spearman rank correlation of predicted and true scores.")),
    (r"bits per byte", Column("negative log2-probability of the text, divided by its bytes.", "lower")),
    (r"\berror\b", Column("mean error.", "lower")),
    (r"\b(parameters|weights)\b", Column("number of trained parameters.", None)),
    (r"\branks?\b", Column("number of directions left.", None)),
    (r"\bseconds\b", Column("time taken, in seconds.", None)),
)


def describe(name: str) -> Column:
    """Definition of the column called ``name``; an unknown name has no definition and no better end."""
    lowered = re.sub(r"[_\-\s]+", " ", name.lower())
    for pattern, column in _COLUMNS:
        if found := re.search(pattern, lowered):
            return Column(column.meaning.format(**found.groupdict()), column.better, column.percent)
    return Column(UNKNOWN, None)


def is_lower_better(name: str) -> bool:
    """Whether less of a column is better."""
    return describe(name).better == "lower"


def mean_of(value: Any) -> float | None:
    """The number of a cell, be it plain or a mean with its spread; ``None`` for one that is absent."""
    if isinstance(value, Mapping):
        value = value.get("mean")
    return None if value is None else float(value)


def write_value(name: str, value: Any) -> str:
    """A cell's text: four decimals, a percentage or a count, with its standard deviation if it has one."""
    mean = mean_of(value)
    if mean is None:
        return ABSENT
    spread = value.get("sd") if isinstance(value, Mapping) else None
    return _number(name, mean) if spread is None else f"{_number(name, mean, '')} ± {_number(name, spread)}"


def _number(name: str, number: float, unit: str = " %") -> str:
    column = describe(name)
    if not math.isfinite(number):
        return str(number)
    if column.percent:
        return f"{100 * number:.1f}{unit}"
    if column.better is None and number == int(number):
        return f"{int(number):,}"
    return f"{number:.4f}" if abs(number) < 1000 else f"{number:,.1f}"


def best_rows(name: str, values: Sequence[Any]) -> set[int]:
    """Places of the best values of a column: several where they tie, none in a column without a better end.

    A single value is no best one.
    """
    better = describe(name).better
    numbers = {place: mean for place, value in enumerate(values) if (mean := mean_of(value)) is not None}
    finite = {place: mean for place, mean in numbers.items() if math.isfinite(mean)}
    if better is None or len(finite) < 2:
        return set()
    best = max(finite.values()) if better == "higher" else min(finite.values())
    return {place for place, mean in finite.items() if mean == best}
