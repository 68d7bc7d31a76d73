"""How well a ranking puts the true item first: HR@k, NDCG@k, MRR, and the papers' protocol.

There is one relevant item a case. Where scores tie, each metric is its expectation over all orders of the
tied items, so that a scorer which cannot tell candidates apart gets exactly what chance would give, and never
more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from rankwise.recommend.candidates import cannot_be_won

# The underscore: one call may have cases of different length.
Scores = Float[np.ndarray, " _candidates"]


def possible_ranks(scores: Scores, target: int) -> range:
    """The ranks (from 1) that the target can have: one, or as many as there are scores equal to its own.

    Raises:
        ValueError: the target is no index of the scores, or a score is NaN.
    """
    if not 0 <= target < len(scores):
        raise ValueError(f"target {target} is no index of {len(scores)} scores")
    if np.isnan(scores).any():
        raise ValueError("a score is NaN: such a candidate has no rank")
    better = int((scores > scores[target]).sum())
    tied = int((scores == scores[target]).sum())
    return range(better + 1, better + tied + 1)


def hit_rate(ranks: range, cutoff: int) -> float:
    """HR@cutoff of one case: the probability that the target is among the first ``cutoff``."""
    return sum(rank <= cutoff for rank in ranks) / len(ranks)


def discounted_gain(ranks: range, cutoff: int) -> float:
    """NDCG@cutoff of one case with one relevant item: mean of 1 / log2(rank + 1), 0 beyond the cutoff."""
    return sum(1 / float(np.log2(rank + 1)) for rank in ranks if rank <= cutoff) / len(ranks)


def reciprocal_rank(ranks: range) -> float:
    """The mean of 1 / rank of one case; its mean over cases is the MRR."""
    return sum(1 / rank for rank in ranks) / len(ranks)


def case_metrics(scores: Scores, target: int, cutoffs: Sequence[int] = (1, 5)) -> dict[str, float]:
    """HR and NDCG at each cutoff, and the reciprocal rank, of one case."""
    ranks = possible_ranks(scores, target)
    values = {f"HR@{cutoff}": hit_rate(ranks, cutoff) for cutoff in cutoffs}
    # NDCG@1 is HR@1.
    values |= {f"NDCG@{cutoff}": discounted_gain(ranks, cutoff) for cutoff in cutoffs if cutoff > 1}
    return values | {"MRR": reciprocal_rank(ranks)}


def ranking_metrics(
    scores: Sequence[Scores], targets: Sequence[int], cutoffs: Sequence[int] = (1, 5)
) -> dict[str, float]:
    """Means over cases of ``case_metrics``; cases may differ in their number of candidates.

    Args:
        scores: of each case, one score a candidate; higher is better.
        targets: of each case, the place of the true candidate.
        cutoffs: each gives HR@k and, above 1, NDCG@k.

    Raises:
        ValueError: there is no case, or scores and targets differ in number.
    """
    if len(scores) != len(targets) or not len(scores):
        raise ValueError(f"{len(scores)} rows of scores and {len(targets)} targets: must be equal and at least 1")
    cases = [case_metrics(one, target, cutoffs) for one, target in zip(scores, targets, strict=True)]
    return {name: float(np.mean([case[name] for case in cases])) for name in cases[0]}


@dataclass(frozen=True)
class ProtocolResult:
    """The papers' metrics on generated texts."""

    hit_rate: float  # HR@1 over all cases, as in the S-DPO code
    hit_rate_valid: float  # HR@1 over the valid cases only, as in LLaRA's; 0 where none is valid
    valid_ratio: float
    cases: int
    cannot_be_won: int  # cases in which the right answer itself would be invalid
    outcomes: tuple[tuple[bool, bool], ...]  # of each case, whether its text is valid, and whether it is right


def substring_protocol(
    texts: Sequence[str], candidates: Sequence[Sequence[str]], targets: Sequence[str]
) -> ProtocolResult:
    """The papers' protocol on generated texts.

    A text is valid if exactly one candidate occurs in it, and right if that is the true one. Letters' case is
    ignored. A wrong candidate whose name is inside the right one's ("Fish" in "Reel Big Fish") makes the case
    one that cannot be won: the right answer then holds two candidates. These are counted, and stay in.

    Raises:
        ValueError: there is no case, or the three differ in number.
    """
    if not len(texts) == len(candidates) == len(targets) or not texts:
        raise ValueError(
            f"{len(texts)} texts, {len(candidates)} lists and {len(targets)} targets: must be equal, not 0"
        )
    outcomes = tuple(_outcome(*case) for case in zip(texts, candidates, targets, strict=True))
    valid, right = sum(valid for valid, _ in outcomes), sum(right for _, right in outcomes)
    return ProtocolResult(
        hit_rate=right / len(outcomes),
        hit_rate_valid=right / valid if valid else 0.0,
        valid_ratio=valid / len(outcomes),
        cases=len(outcomes),
        cannot_be_won=sum(cannot_be_won(*case) for case in zip(candidates, targets, strict=True)),
        outcomes=outcomes,
    )


def _outcome(text: str, candidates: Sequence[str], target: str) -> tuple[bool, bool]:
    """Whether the text is valid, and whether it is right."""
    lowered = text.lower()
    found = [title for title in candidates if title.strip().lower() in lowered]
    return len(found) == 1, found == [target]
