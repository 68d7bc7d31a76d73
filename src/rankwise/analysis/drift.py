"""How far a model's hidden states have drifted in training, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rankwise.analysis.representations import linear_cka
from rankwise.errors import UserError
from rankwise.methods import base_of
from rankwise.tokenise import IGNORED

VECTORS, BATCH = 2048, 8  # of tokens that are compared, at most; rows of a batch
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
        ``encoder`` and ``decoder``. None where the states do not vary.
    """
    training = model.training
    model.eval()
    try:
        with base_of(model):
            before = _states(model, rows, padding)
        after = _states(model, rows, padding)
    finally:
        model.train(training)
    return {name: _cka(before[name], after[name]) for name in before}


def _cka(before: Tensor, after: Tensor) -> float | None:
    try:
        return linear_cka(before, after)
    except UserError:
        return None


@torch.no_grad()
def _states(model: PeftModel, rows: Sequence[Row], padding: int) -> dict[str, Tensor]:
    """For each layer the hidden states of some tokens, on the CPU."""
    found: dict[str, list[Tensor]] = {}
    step = max(1, sum(len(row["input_ids"]) for row in rows) // VECTORS)
    for start in range(0, len(rows), BATCH):
        batch = _batch(model, rows[start : start + BATCH], padding)
        output = model(**batch, output_hidden_states=True)
        for name, states, mask in _layers(output, batch):
            own = states[:, -mask.shape[1] :][mask]  # virtual tokens stand before
            found.setdefault(name, []).append(own[::step].float().cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def _batch(model: PeftModel, rows: Sequence[Row], padding: int) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    filling = {"input_ids": padding, "attention_mask": 0, "token_type_ids": 0}
    if model.get_base_model().config.is_encoder_decoder:
        filling["labels"] = IGNORED
    given = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {
        name: pad_sequence([torch.tensor(row[name]) for row in given], True, value).to(device)
        for name, value in filling.items()
        if name in given[0]
    }


def _layers(output: Any, batch: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, states and mask of each layer."""
    read = batch["attention_mask"].bool()
    if "labels" not in batch:
        yield from ((str(number), states, read) for number, states in enumerate(output.hidden_states))
        return
    written = batch["labels"] != IGNORED
    sides = (("encoder", output.encoder_hidden_states, read), ("decoder", output.decoder_hidden_states, written))
    for side, layers, mask in sides:
        yield from ((f"{side} {number}", states, mask) for number, states in enumerate(layers))
