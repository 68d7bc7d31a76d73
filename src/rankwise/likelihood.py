"""Log-probabilities of answers under a causal language model: the one place where they are computed."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import DynamicCache

# Logits that are worked on at a time: 16 MiB in float32.
AT_A_TIME = 2**22


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
        Log-probabilities in nats, float32 at least, and a mask that is true at answer tokens; ``kept`` is the length of
        the common end. Where the mask is false the value is 0.
    """
    labels = batch["labels"][:, 1:]
    has_answer = (labels != -100).any(dim=0).nonzero()
    kept = labels.shape[1] - int(has_answer[0]) if len(has_answer) else 1
    logits = last_logits(model, batch["input_ids"], batch["attention_mask"], kept + 1)
    labels = labels[:, -kept:]
    mask = labels != -100
    places = nn.functional.pad(mask, (0, 1)).flatten().nonzero()[:, 0]  # nothing is predicted from the last column
    found = target_log_probabilities(logits.flatten(0, 1), places, labels[mask])
    return found.new_zeros(mask.shape).masked_scatter(mask, found), mask


def target_log_probabilities(
    logits: Float[Tensor, "rows vocabulary"], rows: Int[Tensor, " targets"], targets: Int[Tensor, " targets"]
) -> Float[Tensor, " targets"]:
    """``log_softmax(logits)[rows, targets]`` in nats, float32 at least, with little memory beside the logits.

    ``log_softmax`` in float32 and its gradients are up to four tensors of the logits' size. Here only the logits and
    their gradient are, in the model's dtype; all else is computed in float32 over a few rows at a time.

    Args:
        logits: as the model's head gives them.
        rows: of each target, its row of ``logits``.
        targets: token ids; no pair of row and target twice.
    """
    found: Tensor = _TargetLogProbabilities.apply(logits, rows, targets)  # type: ignore[no-untyped-call]
    return found


class _TargetLogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        normalisers = torch.cat([part.to(wide).logsumexp(dim=1) for part in _parts(logits, logits.shape[1])])
        found = logits[rows, targets].to(wide) - normalisers[rows]
        ctx.save_for_backward(logits, rows, targets, normalisers, found)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Of the logits: each target's gradient at its place, minus a row's total times the row's softmax."""
        logits, rows, targets, normalisers, found = ctx.saved_tensors
        totals = torch.zeros_like(normalisers).index_put((rows,), gradients[0], accumulate=True)
        result = torch.empty_like(logits)
        parts = (_parts(tensor, logits.shape[1]) for tensor in (result, logits, normalisers, totals))
        for out, part, normaliser, total in zip(*parts, strict=True):
            out.copy_((part - normaliser[:, None]).exp_().mul_(-total[:, None]))
        # In one piece, before it is rounded to the logits' dtype: where a target is nearly sure, its terms cancel.
        result[rows, targets] = (gradients[0] - totals[rows] * found.exp()).to(result.dtype)
        return result, None, None


def _parts(tensor: Tensor, vocabulary: int) -> tuple[Tensor, ...]:
    return torch.split(tensor, max(1, AT_A_TIME // vocabulary))


def tokens_for_logits(model: nn.Module, wanted: int, numbers: int = 2**26) -> int:
    """At most ``wanted`` tokens, and no more than have ``numbers`` logits (256 MiB in float32) over the vocabulary."""
    return max(1, min(wanted, numbers // int(unwrapped(model).config.get_text_config().vocab_size)))


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
    """Logits at the last position, float32 at least, and the cache of keys and values; rows are padded on the left."""
    inputs = _inputs(model, input_ids, attention_mask, 1)
    output = model(**inputs, past_key_values=DynamicCache(), use_cache=True)
    logits = output.logits[:, -1]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)), output.past_key_values


def _inputs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, count: int) -> dict[str, Any]:
    """What the model's forward takes, of the ids, their mask, their positions and how many logits are wanted."""
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    known = forward_arguments(model)
    if "position_ids" in known and not has_virtual_tokens(model):
        inputs["position_ids"] = position_ids(attention_mask)
    if "logits_to_keep" in known:
        inputs["logits_to_keep"] = count
    return inputs


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode meanwhile, and then back in its own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def forward_arguments(model: nn.Module) -> set[str]:
    """Names of the arguments that the unwrapped model's ``forward`` takes."""
    return set(inspect.signature(unwrapped(model).forward).parameters)


def has_virtual_tokens(model: nn.Module) -> bool:
    """Whether an adapter puts virtual tokens before each row: those count positions themselves."""
    inner = _without_wrappers(model)
    return isinstance(inner, PeftModel) and inner.active_peft_config.is_prompt_learning


def unwrapped(model: nn.Module) -> Any:
    """The language model itself, inside PEFT's wrapper and those of torch.compile, DistributedDataParallel and such."""
    inner = _without_wrappers(model)
    return inner.get_base_model() if isinstance(inner, PeftModel) else inner


def _without_wrappers(model: nn.Module) -> Any:
    inner: Any = model
    for wrapped in ("_orig_mod", "module", "_orig_mod"):
        inner = getattr(inner, wrapped, inner)
    return inner
