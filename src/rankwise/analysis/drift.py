"""How far a model's hidden states have drifted in training, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rankwise.analysis.representations import linear_cka
from rankwise.errors import UserError
from rankwise.likelihood import evaluating, forward_arguments
from rankwise.methods import base_of
from rankwise.tokenise import IGNORED

VECTORS = 2048  # that are compared of a layer, at most
BATCH_TOKENS = 4096  # padding included; a longer row is a batch of its own
Row = Mapping[str, Any]


def drift(model: PeftModel, rows: Sequence[Row], padding: int) -> dict[str, float | None]:
    """Linear CKA of each layer's hidden states before and after training, over tokens of the same rows.

    1 is no drift, up to rotation and scale; see :func:`linear_cka`. At most 2,048 tokens are compared, evenly spaced
    over the rows; virtual tokens, which the base has not, are left out.

    Args:
        model: with its adapter; left as it was.
        rows: ``input_ids``, and ``token_type_ids`` where the model has them; ``labels`` for an encoder-decoder.
        padding: id of the token that fills batches.

    Returns:
        The value for each layer by name, ``0`` being the embeddings; for an encoder-decoder the names begin with
        ``encoder`` and, where its rows have targets, ``decoder``. None where the states do not vary.
    """
    with evaluating(model):
        with base_of(model):
            before = _states(model, rows, padding)
        after = _states(model, rows, padding)
    return {name: _cka(before[name], after[name]) for name in before}


def _cka(before: Tensor, after: Tensor) -> float | None:
    try:
        return linear_cka(before, after)
    except UserError:
        return None


@torch.no_grad()
def _states(model: PeftModel, rows: Sequence[Row], padding: int) -> dict[str, Tensor]:
    """For each layer the hidden states of some tokens, on the CPU."""
    known = forward_arguments(model)
    read, written = (_some([len(row[name]) for row in rows]) for name in _sides(model, rows))
    spared: dict[str, Any] = {"use_cache": False} if "use_cache" in known else {}
    if "logits_to_keep" in known and _sides(model, rows)[1] != "labels":
        spared["logits_to_keep"] = 1
    found: dict[str, list[Tensor]] = {}
    for picked in _batches(rows):
        batch = _batch(model, [rows[place] for place in picked], padding)
        output = model(**batch, **spared, output_hidden_states=True)
        for name, states, of_rows in _layers(output, read, written if "labels" in batch else []):
            taken = pad_sequence([of_rows[place] for place in picked], True).to(states.device)
            found.setdefault(name, []).append(states[:, -taken.shape[1] :][taken].float().cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def _sides(model: PeftModel, rows: Sequence[Row]) -> tuple[str, str]:
    """The columns whose tokens are read and written; the same one where nothing is written."""
    targets = model.get_base_model().config.is_encoder_decoder and isinstance(rows[0].get("labels"), Sequence)
    return "input_ids", "labels" if targets else "input_ids"


def _some(lengths: Sequence[int]) -> list[Tensor]:
    """A mask for each row over its tokens, of at most ``VECTORS`` in all, evenly spaced."""
    step = max(1, math.ceil(sum(lengths) / VECTORS))
    taken = torch.arange(sum(lengths)) % step == 0
    return list(torch.split(taken, list(lengths)))


def _batches(rows: Sequence[Row]) -> Iterator[list[int]]:
    """Places of rows, the longest first, few enough for a batch."""
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place]["input_ids"]))
    while order:
        size = max(1, BATCH_TOKENS // len(rows[order[0]]["input_ids"]))
        yield order[:size]
        order = order[size:]


def _batch(model: PeftModel, rows: Sequence[Row], padding: int) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    filling = {"input_ids": padding, "attention_mask": 0, "token_type_ids": 0}
    if _sides(model, rows)[1] == "labels":
        filling["labels"] = IGNORED
    given = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {
        name: pad_sequence([torch.tensor(row[name]) for row in given], True, value).to(device)
        for name, value in filling.items()
        if name in given[0]
    }


def _layers(
    output: Any, read: Sequence[Tensor], written: Sequence[Tensor]
) -> Iterator[tuple[str, Tensor, Sequence[Tensor]]]:
    """Name and states of each layer, and which of the rows' tokens are taken."""
    if getattr(output, "encoder_hidden_states", None) is None:
        yield from ((str(number), states, read) for number, states in enumerate(output.hidden_states))
        return
    yield from ((f"encoder {number}", states, read) for number, states in enumerate(output.encoder_hidden_states))
    if written:
        yield from (
            (f"decoder {number}", states, written) for number, states in enumerate(output.decoder_hidden_states)
        )
