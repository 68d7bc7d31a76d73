"""Score each case's candidates under a language model: the prompt is read once, each candidate continues its cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from rankwise.errors import UserError
from rankwise.likelihood import forward_arguments, last_logits_and_cache, position_ids
from rankwise.recommend.metrics import Scores
from rankwise.tokenise import encode_answer_set, encode_prompt, pad_left, padding_token

Encoded = tuple[list[int], list[list[int]]]


@torch.no_grad()
def score_candidates(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[Sequence[str]],
    context: int,
    batch_tokens: int = 16384,
) -> list[Scores]:
    """Summed log-probability, in nats, of every candidate answer after its prompt, its end-of-text token included.

    Prompts of a batch are read once, without logits but for their last position; each candidate continues a copy of its
    prompt's keys and values. The scores equal those of separate sequences up to rounding, whatever the batch.

    Args:
        model: a causal language model, adapted or not, in evaluation mode.
        tokenizer: the model's.
        prompts: one text a case.
        answers: one list of texts a case; lists may differ in length.
        context: most tokens of a prompt with an answer; a longer prompt is cut on the left.
        batch_tokens: most tokens, padding included, of the prompts and candidates of one batch.

    Returns:
        For each case an array with one score a candidate.

    Raises:
        UserError: a candidate alone is longer than the context.
    """
    encoded = [_encode(tokenizer, *case, context) for case in zip(prompts, answers, strict=True)]
    scores: list[Scores] = [np.zeros(0)] * len(encoded)
    for picked in _batches(encoded, batch_tokens):
        found = _score_batch(model, [encoded[index] for index in picked], padding_token(tokenizer))
        for index, values in zip(picked, found, strict=True):
            scores[index] = values
    return scores


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, answers: Sequence[str], context: int) -> Encoded:
    made = encode_answer_set(tokenizer, prompt, answers, context)
    if made is None:
        longest = max(answers, key=len)
        raise UserError(f"candidate {longest[:80]!r} does not fit a context of {context} tokens: raise model.context")
    return made[0], made[1]


def _batches(encoded: Sequence[Encoded], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of cases of similar length whose padded tokens, with every candidate's prompt in the cache, fit."""
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index][0]), reverse=True)
    batch: list[int] = []
    width = answers = longest = 0
    for index in order:
        prompt, candidates = encoded[index]
        width, answers = max(width, len(prompt)), answers + len(candidates)
        longest = max(longest, *map(len, candidates))
        if batch and answers * longest + (len(batch) + 1) * width > batch_tokens:
            yield batch
            batch, width, answers, longest = [], len(prompt), len(candidates), max(map(len, candidates))
        batch.append(index)
    if batch:
        yield batch


def _score_batch(model: nn.Module, cases: Sequence[Encoded], padding: int) -> list[Scores]:
    """Scores of a batch of cases; candidates are padded on the right."""
    device = next(model.parameters()).device
    ids, mask = pad_left([prompt for prompt, _ in cases], padding)
    logits, cache = last_logits_and_cache(model, ids.to(device), mask.to(device))
    owners = torch.tensor([case for case, (_, answers) in enumerate(cases) for _ in answers], device=device)
    tokens = _pad_right([answer for _, answers in cases for answer in answers]).to(device)
    first = logits.log_softmax(-1)[owners].gather(1, tokens[:, :1])
    later = _continue(model, cache, mask.to(device), owners, tokens) if tokens.shape[1] > 1 else first[:, :0]
    totals = (torch.cat([first, later], dim=1) * (tokens >= 0)).sum(dim=1).double().cpu().numpy()
    ends = np.cumsum([len(answers) for _, answers in cases])[:-1]
    return list(np.split(totals, ends))


def _continue(model: nn.Module, cache: DynamicCache, mask: Tensor, owners: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each candidate's tokens after its first, given its prompt's cache; 0 at padding."""
    cache.batch_select_indices(owners)
    real = tokens >= 0
    inputs, targets = tokens[:, :-1].clamp(min=0), tokens[:, 1:].clamp(min=0)
    whole = torch.cat([mask[owners], real[:, :-1].to(mask.dtype)], dim=1)
    places = {"position_ids": position_ids(whole)[:, mask.shape[1] :]}
    known = places if "position_ids" in forward_arguments(model) else {}
    logits = model(input_ids=inputs, attention_mask=whole, past_key_values=cache, use_cache=True, **known).logits
    found: Tensor = logits.float().log_softmax(-1).gather(2, targets[:, :, None])[:, :, 0]
    return found * real[:, 1:]


def _pad_right(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of one length, filled with -1."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows])


@torch.no_grad()
def generate_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    context: int,
    tokens: int = 20,
    batch_size: int = 64,
) -> list[str]:
    """What the model writes after each row's prompt: greedy, at most ``tokens`` tokens, as in the papers' protocol."""
    device = next(model.parameters()).device
    prompts = [encode_prompt(tokenizer, row["prompt"], context - tokens) for row in rows]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    texts = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        picked = order[start : start + batch_size]
        ids, mask = pad_left([prompts[index] for index in picked], padding_token(tokenizer))
        written = model.generate(  # type: ignore[operator]
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=padding_token(tokenizer),
        )[:, ids.shape[1] :]
        decoded = tokenizer.batch_decode(written, skip_special_tokens=True)
        for index, text in zip(picked, decoded, strict=True):
            texts[index] = text
    return texts
