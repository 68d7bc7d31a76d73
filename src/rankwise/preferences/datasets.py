"""The trainer's rows as tokens: of training and evaluation, with what draws rejected answers for the former."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from rankwise.counting import count
from rankwise.errors import UserError
from rankwise.preferences.config import COLUMNS, SoftmaxDPOConfig
from rankwise.preferences.drawing import Negatives
from rankwise.preferences.negatives import Catalogue
from rankwise.preferences.rows import PreferenceRow, encode_preferences
from rankwise.tokenise import answer_ids

Rows = Iterable[Mapping[str, Any]]
BEYOND = "rejected answers beyond the number of negatives, never trained on"


@dataclass
class PreferenceData:
    """Rows for a trainer.

    Attributes:
        train: rows to train on, if any.
        evaluation: rows to evaluate on, if any; their numbers go on from those of training.
        negatives: draws rejected answers for training rows; None where they keep all that they have.
        longest: tokens of the longest prompt with any answer that it may get.
        counts: what was cut or dropped, and rows that will have too few negatives.
    """

    train: list[PreferenceRow] | None = None
    evaluation: list[PreferenceRow] | None = None
    negatives: Negatives | None = None
    longest: int = 0
    counts: dict[str, int] = field(default_factory=dict)

    def number(self) -> None:
        """Number all rows from 1, and see how long they may become."""
        rows = [*(self.train or ()), *(self.evaluation or ())]
        for number, row in enumerate(rows, start=1):
            row.number = number
        self.longest = max([self.longest, *(row.length for row in rows)])

    def add(self, counts: Mapping[str, int]) -> None:
        """Add counts."""
        for name, number in counts.items():
            count(self.counts, name, number)


def read_data(
    train: Rows | None,
    evaluation: Rows | None,
    tokenizer: PreTrainedTokenizerBase,
    settings: SoftmaxDPOConfig,
    catalogue: Catalogue | None,
) -> PreferenceData:
    """Tokenise the rows of a trainer.

    Raises:
        UserError: what :func:`rankwise.preferences.rows.encode_preferences` and
            :class:`rankwise.preferences.drawing.Negatives` refuse, or several data sets by name.
    """
    for name, rows in (("train_dataset", train), ("eval_dataset", evaluation)):
        if isinstance(rows, Mapping):
            raise UserError(
                f"{name} is a mapping with {', '.join(map(str, rows.keys()))}: give the rows of one data set"
            )
    data = PreferenceData()
    if evaluation is not None:
        data.evaluation, counts = encode_preferences(evaluation, tokenizer, settings.max_length)
        data.add(counts)
    seen: list[Any] = []
    if train is not None:
        listed = list(train)
        seen = [row.get("seen") or () for row in listed]
        _encode(data, listed, seen, tokenizer, settings, catalogue)
    data.number()
    drawn = settings.negatives != "given" or settings.stages() is not None or any(seen)
    if data.train is not None and drawn:
        data.negatives = Negatives(settings, data.train, seen, catalogue, tokenizer)
        data.add(data.negatives.counts)
        data.negatives.counts = data.counts  # to which training adds
    return data


def _encode(
    data: PreferenceData,
    rows: Sequence[Mapping[str, Any]],
    seen: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    settings: SoftmaxDPOConfig,
    catalogue: Catalogue | None,
) -> None:
    """Training rows, with room for the answers that they may get later."""
    column, room = COLUMNS.get(settings.negatives), 0
    if settings.negatives == "in-batch":
        chosen, _ = encode_preferences(rows, tokenizer, settings.max_length, rejected=None)
        room = max(len(row.answers[0]) for row in chosen)
    elif column is None and catalogue is not None:
        room = max(map(len, answer_ids(tokenizer, catalogue.answers)))
    data.train, counts = encode_preferences(rows, tokenizer, settings.max_length, rejected=column, room=room)
    data.add(counts)
    data.longest = max(len(row.prompt) + room for row in data.train)
    stages = settings.stages()
    if settings.negatives == "given" and stages is not None:
        pairs = zip(data.train, seen, strict=True)
        data.train = [_first(row, barred, stages[-1][1], data.counts) for row, barred in pairs]


def _first(row: PreferenceRow, seen: Iterable[str], most: int, counts: dict[str, int]) -> PreferenceRow:
    """The row with so many of its rejected answers: no others are ever trained on."""
    barred = set(seen)
    kept = [place for place, text in enumerate(row.texts) if place == 0 or text not in barred]
    count(counts, BEYOND, len(kept[1 + most :]))
    kept = kept[: 1 + most]
    return replace(row, answers=[row.answers[at] for at in kept], texts=[row.texts[at] for at in kept])
