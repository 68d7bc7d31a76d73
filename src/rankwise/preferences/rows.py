"""From rows of text to batches: a prompt with its chosen and rejected answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rankwise.errors import UserError
from rankwise.tokenise import ANSWERS_TOO_LONG, IGNORED, PROMPTS_CUT, AnswerCollator, encode_answer_set


@dataclass
class PreferenceRow:
    """Token ids of one row.

    Attributes:
        prompt: ids of the prompt.
        answers: ids of the chosen answer, then of each rejected one.
        reference: log-probabilities of the answers under the reference, in nats, once they are known.
    """

    prompt: list[int]
    answers: list[list[int]]
    reference: list[float] | None = None

    @property
    def length(self) -> int:
        """Tokens of the prompt with its longest answer."""
        return len(self.prompt) + max(map(len, self.answers))


def encode_preferences(
    rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, context: int
) -> tuple[list[PreferenceRow], dict[str, int]]:
    """Tokenise rows of ``prompt``, ``chosen`` and ``rejected``.

    Args:
        rows: mappings with two texts and a list of texts.
        tokenizer: its end-of-text token closes each answer.
        context: most tokens of a prompt with its longest answer; a longer prompt is cut on the left.

    Returns:
        The encoded rows, and counts of what was cut or dropped.

    Raises:
        UserError: a row lacks a field or has no rejected answer, or no row is left.
    """
    encoded: list[PreferenceRow] = []
    counts: Counter[str] = Counter()
    for number, row in enumerate(rows, start=1):
        _check(row, number)
        made = encode_answer_set(tokenizer, row["prompt"], [row["chosen"], *row["rejected"]], context)
        if made is None:
            counts[ANSWERS_TOO_LONG] += 1
            continue
        prompt, answers, was_cut = made
        counts[PROMPTS_CUT] += was_cut
        encoded.append(PreferenceRow(prompt, answers))
    if not encoded:
        raise UserError(
            f"no preference row is left of {sum(counts.values())}: {dict(counts)}; raise context above {context}"
        )
    return encoded, {name: count for name, count in counts.items() if count}


def _check(row: Mapping[str, Any], number: int) -> None:
    missing = [name for name in ("prompt", "chosen", "rejected") if not row.get(name)]
    if missing:
        raise UserError(
            f"preference row {number} has no {' and no '.join(missing)}: each row needs prompt, chosen, rejected"
        )
    if not all(isinstance(text, str) for text in (row["prompt"], row["chosen"], *row["rejected"])):
        raise UserError(f"preference row {number} holds something that is no text: prompt and answers are texts")
    if isinstance(row["rejected"], str):
        raise UserError(f"preference row {number}: rejected is a text, {row['rejected'][:40]!r}; give a list of texts")


@dataclass(frozen=True)
class PreferenceCollator:
    """Rows of one batch as separate sequences, prompt with answer, padded on the left.

    Gives ``input_ids``, ``attention_mask``, ``labels`` (sequences, length), and ``exists`` and ``reference``
    (batch, 1 + most negatives): which answers a row has, and their reference log-probabilities (0 until known).
    """

    pad_token_id: int
    multiple_of: int = 16

    def __call__(self, rows: Sequence[PreferenceRow]) -> dict[str, Tensor]:
        """Pad and stack."""
        sequences = [
            {"input_ids": row.prompt + answer, "labels": [IGNORED] * len(row.prompt) + answer}
            for row in rows
            for answer in row.answers
        ]
        most = max(len(row.answers) for row in rows)
        exists = torch.zeros(len(rows), most, dtype=torch.bool)
        reference = torch.zeros(len(rows), most)
        for index, row in enumerate(rows):
            exists[index, : len(row.answers)] = True
            if row.reference is not None:
                reference[index, : len(row.answers)] = torch.tensor(row.reference)
        padded = AnswerCollator(self.pad_token_id, self.multiple_of)(sequences)
        return {**padded, "exists": exists, "reference": reference}
