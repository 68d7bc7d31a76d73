"""Which wrong answers a row is trained against: its own, or drawn anew for each pass by seed, row and draw alone."""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

from rankwise.counting import count as add
from rankwise.errors import UserError, nearest

Kind = Literal["given", "candidates", "uniform", "popularity", "in-batch", "hard"]
FIELDS = {"given": "rejected", "candidates": "candidates"}

TOO_FEW = "rows with fewer negatives than wanted"
UNKNOWN_SEEN = "seen answers that the catalogue lacks"

TRIES = 100  # for each answer that is wanted; after them, what is left has little chance beside the rest


class Drawn(NamedTuple):
    """Wrong answers of a row.

    Attributes:
        answers: distinct texts.
        weights: of each, m / w, where its chance is in proportion to w, and m is the mean of w over all answers that
            might have been drawn. A sum over draws with these weights estimates, up to a constant, the sum over all
            answers: the logQ correction of sampled softmax, exact for draws with replacement. 1 where all have the same
            chance, and for ``given``, ``in-batch`` and ``hard``.
    """

    answers: list[str]
    weights: list[float]


def draw_negatives(
    row: Mapping[str, Any],
    count: int,
    kind: Kind,
    *,
    seed: int,
    number: int,
    draw: int,
    catalogue: Catalogue | None = None,
    others: Sequence[str] = (),
) -> Drawn:
    """Wrong answers for a row: distinct, never the chosen one and none of ``seen``.

    Args:
        row: texts ``chosen`` and, where they are drawn from, ``rejected`` (one or a list) or ``candidates`` (a list);
            may have ``seen``, any collection of texts.
        count: how many are wanted; a row with fewer left gets those, and `check_negatives` counts it.
        kind: ``given`` takes the first of ``rejected``, ``hard`` the first of ``others``; ``candidates`` draws evenly
            from ``candidates``, as the paper does, and ``in-batch`` from ``others``; ``uniform`` draws evenly from the
            catalogue, and ``popularity`` by its popularity.
        seed: of the run.
        number: the row's in its data set, from 1; the draw depends on this, the seed and ``draw`` alone.
        draw: which one it is for this row, such as the pass over the data.
        catalogue: for ``uniform`` and ``popularity``.
        others: for ``in-batch`` the chosen answers of the batch's other rows; for ``hard`` the mined ones, best first.

    Raises:
        UserError: no wrong answer is left for the row, or there is no catalogue where one is needed.
    """
    generator = random.Random(f"{seed}:negatives:{number}:{draw}")
    if kind in ("uniform", "popularity"):
        found = _needed(catalogue, kind)
        places, weights = found.draw(generator, found.excluded(row), count, kind == "popularity")
        answers = [found.answers[place] for place in places]
    else:
        listed = _admissible(row, _listed(row, FIELDS[kind], number) if kind in FIELDS else others)
        drawn_evenly = kind in ("candidates", "in-batch")
        answers = generator.sample(listed, min(count, len(listed))) if drawn_evenly else listed[:count]
        weights = [1.0] * len(answers)
    if not answers:
        raise _none_left(number, kind)
    return Drawn(answers, weights)


def check_negatives(
    rows: Iterable[Mapping[str, Any]], count: int, kind: str, catalogue: Catalogue | None = None
) -> dict[str, int]:
    """See before training that every row will have a wrong answer; of ``in-batch`` that is not known before.

    Returns:
        How many rows will have fewer than ``count`` (`TOO_FEW`), and of ``seen`` what can exclude nothing since the
        catalogue lacks it (`UNKNOWN_SEEN`); without zeros.

    Raises:
        UserError: the kind is unknown or count below 1; a row has no negative, or no text as its chosen answer; a field
            is a text where a list of them is needed; an answer is the chosen one but for spaces around it; all of
            ``seen`` is outside the catalogue, as titles are that no template rendered.
    """
    if kind not in get_args(Kind):
        raise UserError(f"negatives of kind {kind!r} are unknown; {nearest(kind, get_args(Kind))}")
    if count < 1:
        raise UserError(f"{count} negatives a row are not possible: give 1 or more")
    counts: dict[str, int] = {}
    seen = 0
    for number, row in enumerate(rows, start=1):
        _check_chosen(row, number)
        barred = _listed(row, "seen", number)
        if kind == "in-batch":
            continue
        left = _left(row, kind, number, catalogue)
        if not left:
            raise _none_left(number, kind)
        add(counts, TOO_FEW, int(left < count))
        if kind not in FIELDS:
            seen += len(barred)
            add(counts, UNKNOWN_SEEN, sum(text not in _needed(catalogue, kind).places for text in barred))
    if seen and counts.get(UNKNOWN_SEEN) == seen:
        raise UserError(
            f"none of {seen} seen answers is in the catalogue: write them as they stand in it, rendered by the template"
        )
    return counts


def _left(row: Mapping[str, Any], kind: str, number: int, catalogue: Catalogue | None) -> int:
    """How many different negatives a row can have."""
    if kind in FIELDS:
        return len(_admissible(row, _alike(row, _listed(row, FIELDS[kind], number), number)))
    found = _needed(catalogue, kind)
    return found.left(found.excluded(row), kind == "popularity")


def _needed(catalogue: Catalogue | None, kind: str) -> Catalogue:
    if catalogue is None:
        raise UserError(f"negatives of kind {kind!r} are drawn from a catalogue of answers, and none is given")
    return catalogue


def _check_chosen(row: Mapping[str, Any], number: int) -> None:
    if not row.get("chosen") or not isinstance(row["chosen"], str):
        raise UserError(
            f"preference row {number}: chosen is {row.get('chosen')!r}, and negatives are drawn for a text alone"
        )


def _listed(row: Mapping[str, Any], field: str, number: int) -> Collection[str]:
    value: Collection[str] = row.get(field) or ()
    if isinstance(value, str) and field == "rejected":
        return [value]
    if isinstance(value, str):
        raise UserError(f"preference row {number}: {field} is a text, {value[:40]!r}; give a list of texts")
    return value


def _admissible(row: Mapping[str, Any], listed: Iterable[str]) -> list[str]:
    barred = {row["chosen"], *(row.get("seen") or ())}
    return [text for text in dict.fromkeys(listed) if text not in barred]


def _alike(row: Mapping[str, Any], listed: Collection[str], number: int) -> Collection[str]:
    chosen = row["chosen"]
    for text in listed:
        if text != chosen and text.strip() == chosen.strip():
            raise UserError(
                f"preference row {number}: {text!r} is drawn from, which is the chosen {chosen!r} but for spaces:"
                " write all answers of a row alike"
            )
    return listed


def _none_left(number: int, kind: str) -> UserError:
    return UserError(
        f"preference row {number} has no negative: of kind {kind!r} there is none but the chosen answer and what was"
        " seen; leave the row out or draw from more"
    )


class Catalogue:
    """All answers that may be drawn as wrong ones: texts as they would stand in ``rejected``.

    Args:
        answers: distinct texts.
        popularity: of each, such as how often it was chosen; 0 or more, and who has 0 is never drawn by it.
        alpha: draws by popularity are in proportion to ``popularity**alpha``; 0 or more. With 1 as users choose, with
            0.75 as word2vec draws (arXiv 1310.4546).

    Attributes:
        answers: the texts.
        places: of each text, its index.

    Raises:
        UserError: there is no answer, one is empty or there twice, or a popularity or alpha is out of its range.
    """

    def __init__(
        self, answers: Sequence[str], popularity: Sequence[float | int] | None = None, alpha: float = 1.0
    ) -> None:
        self.answers = list(answers)
        self.places = {text: place for place, text in enumerate(self.answers)}
        self._popularity = None if popularity is None else list(popularity)
        self._alpha = alpha
        self._check_answers()
        self._check_popularity()

    def merged(self, names: Sequence[str]) -> Catalogue:
        """The catalogue under other names, one for each answer: those of one name are one, as popular as all are."""
        if self._popularity is None:
            return Catalogue(list(dict.fromkeys(names)))
        popularity = dict.fromkeys(names, 0.0)
        for name, value in zip(names, self._popularity, strict=True):
            popularity[name] += value
        return Catalogue(list(popularity), list(popularity.values()), self._alpha)

    def excluded(self, row: Mapping[str, Any]) -> set[int]:
        """Indices of what is never drawn for a row: its ``chosen`` answer and all of its ``seen``."""
        return {self.places[text] for text in (row["chosen"], *(row.get("seen") or ())) if text in self.places}

    def left(self, excluded: Collection[int], by_popularity: bool = False) -> int:
        """How many distinct answers can be drawn where those with ``excluded`` indices cannot."""
        return self._chances(by_popularity).without(excluded)[0]

    def draw(
        self, generator: random.Random, excluded: Collection[int], count: int, by_popularity: bool = False
    ) -> tuple[list[int], list[float]]:
        """Draw ``count`` distinct answers one after the other, or all there are where these are fewer.

        Each is drawn in proportion to the chances of those left. The time grows with ``count`` and the excluded ones
        and not with the catalogue, unless what is left has next to no chance.

        Returns:
            Their indices, and their weights as `Drawn` has them.
        """
        chances = self._chances(by_popularity)
        left, mass = chances.without(excluded)
        wanted = min(count, left)
        drawn: dict[int, None] = {}
        for _ in range(TRIES * wanted):
            place = bisect.bisect(chances.summed, generator.random() * chances.summed[-1])
            if place not in excluded:
                drawn[place] = None
                if len(drawn) == wanted:
                    break
        else:
            drawn |= dict.fromkeys(chances.race(generator, {*excluded, *drawn}, wanted - len(drawn)))
        return list(drawn), [mass / left / chances.weights[place] for place in drawn]

    def _chances(self, by_popularity: bool) -> _Chances:
        return self._popular if by_popularity else self._even

    @cached_property
    def _even(self) -> _Chances:
        size = len(self.answers)
        return _Chances([1.0] * size, range(1, size + 1), size)

    @cached_property
    def _popular(self) -> _Chances:
        if self._popularity is None:
            raise UserError("negatives by popularity need a catalogue that has the popularity of each answer")
        most = max(self._popularity)  # in proportion to it, so that no power is infinite
        weights = [float(value / most) ** self._alpha if value else 0.0 for value in self._popularity]
        return _Chances(weights, list(itertools.accumulate(weights)), sum(weight > 0 for weight in weights))

    def _check_answers(self) -> None:
        if not self.answers:
            raise UserError("a catalogue has to have answers to draw from, and this one has none")
        if "" in self.places:
            raise UserError(f"answer {self.places[''] + 1} of the catalogue is an empty text: leave it out")
        if len(self.places) < len(self.answers):
            twice = next(text for place, text in enumerate(self.answers) if self.places[text] != place)
            raise UserError(f"the catalogue has {twice!r} twice: give each answer once")

    def _check_popularity(self) -> None:
        if not 0 <= self._alpha < math.inf:
            raise UserError(f"alpha {self._alpha} is not possible: the power of popularity is 0 or more, and finite")
        if self._popularity is None:
            return
        if len(self._popularity) != len(self.answers):
            raise UserError(
                f"the catalogue has {len(self.answers)} answers and {len(self._popularity)} popularities: give each one"
            )
        for text, value in zip(self.answers, self._popularity, strict=True):
            if not 0 <= value < math.inf:
                raise UserError(f"popularity {value} of {text!r} is not possible: it is 0 or more, and finite")
        if not any(self._popularity):
            raise UserError("all popularities of the catalogue are 0: nothing can be drawn by them")


class _Chances(NamedTuple):
    weights: Sequence[float]  # of each answer, what its chance is in proportion to
    summed: Sequence[float]  # the same over each answer and those before it
    possible: int  # how many have a weight above 0

    def without(self, excluded: Collection[int]) -> tuple[int, float]:
        """How many have a chance beside those excluded, and their summed weight."""
        weights = [self.weights[place] for place in excluded]
        return self.possible - sum(weight > 0 for weight in weights), float(self.summed[-1] - sum(weights))

    def race(self, generator: random.Random, excluded: Collection[int], count: int) -> list[int]:
        """The first ``count`` to arrive, each after an exponential time with its weight as the rate.

        The law is that of draws in proportion to weight without replacement (Efraimidis and Spirakis 2006).
        """
        places = (place for place, weight in enumerate(self.weights) if weight > 0 and place not in excluded)
        return heapq.nsmallest(count, places, key=lambda place: generator.expovariate(self.weights[place]))


def stages_of_negatives(counts: Sequence[int], starts: Sequence[float | int] | None = None) -> list[tuple[float, int]]:
    """Numbers of negatives that grow in stages of training.

    Args:
        counts: negatives of a row in each stage; none smaller than the one before.
        starts: share of training at which each stage begins, from 0 and rising; stages of one length where not given.

    Returns:
        Each stage's start, from 0 to below 1, and its number of negatives: what `negatives_at` looks up.

    Raises:
        UserError: a value out of its range or order, or as many starts as stages are not there.
    """
    if not counts or min(counts) < 1:
        raise UserError(f"negatives {list(counts)} are not possible: give 1 or more for each stage")
    if any(before > after for before, after in itertools.pairwise(counts)):
        raise UserError(f"negatives {list(counts)} fall: their number stays or grows from stage to stage")
    if starts is None:
        starts = [stage / len(counts) for stage in range(len(counts))]
    if len(starts) != len(counts):
        raise UserError(f"{len(counts)} stages of negatives have {len(starts)} starts: give each one")
    rising = all(before < after for before, after in itertools.pairwise(starts))
    if starts[0] != 0 or starts[-1] >= 1 or not rising:
        raise UserError(
            f"starts of stages {list(starts)} are not possible: shares of training, from 0, rising, below 1"
        )
    return [(float(start), count) for start, count in zip(starts, counts, strict=True)]


def negatives_at(stages: Sequence[tuple[float, int]], share: float) -> int:
    """How many negatives a row has at a ``share`` of training between 0 and 1."""
    return stages[bisect.bisect([start for start, _ in stages], share) - 1][1]
