"""Log-probabilities of answers under a causal language model: the one place where they are computed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from jaxtyping import Bool, Float, Int
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache


def position_ids(attention_mask: Int[Tensor, "batch length"]) -> Int[Tensor, "batch length"]:
    """Positions that count from 0 at each row's first real token, so that padding on the left changes nothing."""
    return (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)


def answer_log_probabilities(
    model: nn.Module, batch: Mapping[str, Tensor]
) -> tuple[Float[Tensor, "batch kept"], Bool[Tensor, "batch kept"]]:
    """Log-probability of each answer token given what stands before it.

    Rows are padded on the left, so that all answers lie in a common end of the rows: the output head, usually the
    widest matrix of all, runs on that end only (where the model's ``forward`` knows ``logits_to_keep``).

    Args:
        model: a causal language model, adapted or not.
        batch: ``input_ids``, ``attention_mask`` and ``labels``, each (batch, length); labels are -100 outside answers.

    Returns:
        Log-probabilities in nats, float32, and a mask that is true at answer tokens; ``kept`` is the length of the
        common end. Where the mask is false the value is 0.
    """
    labels = batch["labels"][:, 1:]
    has_answer = (labels != -100).any(dim=0).nonzero()
    kept = labels.shape[1] - int(has_answer[0]) if len(has_answer) else 1
    logits = last_logits(model, batch["input_ids"], batch["attention_mask"], kept + 1)[:, :-1]
    labels = labels[:, -kept:]
    mask = labels != -100
    losses = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none"
    )
    return -losses.view(labels.shape), mask


def tokens_for_logits(model: nn.Module, wanted: int, numbers: int = 2**26) -> int:
    """At most ``wanted`` tokens, and no more than have ``numbers`` logits (256 MiB in float32) over the vocabulary."""
    inner: Any = getattr(model, "module", model)
    return max(1, min(wanted, numbers // int(inner.config.get_text_config().vocab_size)))


def last_logits(
    model: nn.Module,
    input_ids: Int[Tensor, "batch length"],
    attention_mask: Int[Tensor, "batch length"],
    count: int,
) -> Float[Tensor, "batch count vocabulary"]:
    """Logits at the last ``count`` positions of each row; rows are padded on the left."""
    logits: Tensor = model(**_inputs(model, input_ids, attention_mask, count), use_cache=False).logits
    return logits[:, -count:]


def last_logits_and_cache(
    model: nn.Module, input_ids: Int[Tensor, "batch length"], attention_mask: Int[Tensor, "batch length"]
) -> tuple[Float[Tensor, "batch vocabulary"], DynamicCache]:
    """Logits at the last position, float32, and the cache of keys and values; rows are padded on the left."""
    inputs = _inputs(model, input_ids, attention_mask, 1)
    output = model(**inputs, past_key_values=DynamicCache(), use_cache=True)
    return output.logits[:, -1].float(), output.past_key_values


def _inputs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, count: int) -> dict[str, Any]:
    """What the model's forward takes, of the ids, their mask, their positions and how many logits are wanted."""
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    known = forward_arguments(model)
    if "position_ids" in known:
        inputs["position_ids"] = position_ids(attention_mask)
    if "logits_to_keep" in known:
        inputs["logits_to_keep"] = count
    return inputs


def forward_arguments(model: nn.Module) -> set[str]:
    """Names of the arguments that the unwrapped model's ``forward`` takes."""
    inner: Any = getattr(model, "module", model)  # DistributedDataParallel and its like
    base = inner.get_base_model() if isinstance(inner, PeftModel) else inner
    return set(inspect.signature(base.forward).parameters)
