"""Rows of a batch as tensors, and the log-probabilities of their answers under a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rankwise.likelihood import answer_log_probabilities
from rankwise.preferences.rows import PreferenceRow
from rankwise.tokenise import IGNORED, AnswerCollator
from rankwise.trees import TreeBatch, batch_trees, token_tree, tree_log_probabilities


@dataclass(frozen=True)
class SequenceBatch:
    """Each answer after its own copy of the prompt, padded on the left.

    Attributes:
        input_ids: tokens.
        attention_mask: 1 at them.
        labels: the answers' tokens, -100 elsewhere.
        exists: which answers a row has; those that it has come first.
    """

    input_ids: Int[Tensor, "sequences length"]
    attention_mask: Int[Tensor, "sequences length"]
    labels: Int[Tensor, "sequences length"]
    exists: Bool[Tensor, "batch answers"]

    def to(self, device: torch.device | str) -> SequenceBatch:
        """The same on a device."""
        return SequenceBatch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class BatchMaker:
    """Makes batches of rows.

    Attributes:
        padding: id that fills rows.
        trees: one token tree a row, else separate sequences.
        tokens_per_row: most tokens of a row of packed trees; see :func:`rankwise.trees.batch_trees`.
    """

    padding: int
    trees: bool = True
    tokens_per_row: int | None = None

    def __call__(self, rows: Sequence[PreferenceRow]) -> TreeBatch | SequenceBatch:
        """The rows' answers, chosen first."""
        if self.trees:
            trees = [token_tree(row.prompt, row.answers) for row in rows]
            return batch_trees(trees, self.padding, self.tokens_per_row)
        sequences = [
            {"input_ids": row.prompt + answer, "labels": [IGNORED] * len(row.prompt) + answer}
            for row in rows
            for answer in row.answers
        ]
        exists = by_answer([[1.0] * len(row.answers) for row in rows], 0.0).bool()
        return SequenceBatch(**AnswerCollator(self.padding)(sequences), exists=exists)


def listed(rows: Sequence[PreferenceRow]) -> dict[str, list[PreferenceRow]]:
    """A batch as the rows themselves: which answers they get may depend on the step at which they are trained on."""
    return {"rows": list(rows)}


def by_answer(values: Sequence[Sequence[float]], filling: float) -> Tensor:
    """A value for each answer of each row, (batch, most answers), filled on the right."""
    most = max(map(len, values))
    return torch.tensor([[*row, *[filling] * (most - len(row))] for row in values])


def answer_totals(model: nn.Module, batch: TreeBatch | SequenceBatch) -> Float[Tensor, "batch answers"]:
    """Summed log-probability of every answer, in nats, chosen first; 0 where a row has no such answer.

    Args:
        model: a causal language model, adapted or not.
        batch: on the model's device.
    """
    if isinstance(batch, TreeBatch):
        return tree_log_probabilities(model, batch)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}
    tokens, _ = answer_log_probabilities(model, inputs)
    return tokens.new_zeros(batch.exists.shape).masked_scatter(batch.exists, tokens.sum(dim=1))
