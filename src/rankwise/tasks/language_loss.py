"""The loss of answers under a causal language model, in nats a token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from rankwise.errors import UserError
from rankwise.likelihood import answer_log_probabilities, evaluating, tokens_for_logits
from rankwise.tokenise import IGNORED, AnswerCollator

Encoded = Mapping[str, Sequence[int]]


def answer_loss(
    model: nn.Module,
    encoded_rows: Sequence[Encoded],
    batch_tokens: int = 8192,
    device: torch.device | str | None = None,
) -> dict[str, float]:
    """The mean cross-entropy over all answer tokens: -(1/N) sum of log p(token | what stands before it).

    The mean is over tokens, not over rows, so a long answer weighs more than a short one. How rows are
    batched changes nothing but speed and memory: at its largest, float32 logits of ``batch_tokens`` tokens.
    Logits of the prompts are left out as `rankwise.likelihood` does it.

    Args:
        model: a causal language model, with an adapter or without; its modules are left in their modes.
        encoded_rows: ``input_ids`` and ``labels`` of each row; where the label is -100 there is no loss.
        batch_tokens: at most this many tokens in a batch, padding counted; a longer row is a batch of its
            own.
        device: where the batches go; by default where the model is.

    Returns:
        ``loss`` in nats a token, ``tokens`` that were predicted, and ``perplexity``, the exponential of the
        loss.

    Raises:
        UserError: no row has an answer token that stands after another token.
    """
    predicted = [row for row in encoded_rows if _first_answer(row) is not None]
    if not predicted:
        raise UserError("there is no answer token to predict; the loss needs at least one")
    where = device or next(model.parameters()).device
    total, tokens = 0.0, 0
    with evaluating(model):
        for batch in token_batches(predicted, tokens_for_logits(model, batch_tokens)):
            loss, number = _batch_loss(model, batch, where)
            total, tokens = total + loss, tokens + number
    mean = total / tokens
    return {
        "loss": mean,
        "tokens": tokens,
        "perplexity": torch.tensor(mean, dtype=torch.float64).exp().item(),
    }


def token_batches(rows: Sequence[Encoded], batch_tokens: int) -> Iterator[list[Encoded]]:
    """Rows from the longest to the shortest, in batches whose padded size is at most ``batch_tokens``."""
    # Among equal lengths, rows whose answers begin alike go together: fewer logits are asked for.
    ordered = sorted(rows, key=lambda row: (-len(row["input_ids"]), _first_answer(row) or 0))
    start = 0
    while start < len(ordered):
        size = max(1, batch_tokens // len(ordered[start]["input_ids"]))
        yield ordered[start : start + size]
        start += size


def _first_answer(row: Encoded) -> int | None:
    """The first position whose label is predicted: never the very first, before which nothing stands."""
    positions = range(1, len(row["labels"]))
    return next((position for position in positions if row["labels"][position] != IGNORED), None)


@torch.no_grad()
def _batch_loss(model: nn.Module, rows: Sequence[Encoded], device: torch.device | str) -> tuple[float, int]:
    batch = AnswerCollator(pad_id=0, multiple_of=1)(rows)
    here = {name: tensor.to(device) for name, tensor in batch.items()}
    log_probabilities, mask = answer_log_probabilities(model, here)
    return -float(log_probabilities.double().sum()), int(mask.sum())
