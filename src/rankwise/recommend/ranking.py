"""Score each case's candidates under a language model, with the prompt read once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from rankwise.errors import UserError
from rankwise.likelihood import (
    answer_log_probabilities,
    forward_arguments,
    has_virtual_tokens,
    last_logits_and_cache,
    position_ids,
    tokens_for_logits,
)
from rankwise.recommend.metrics import Scores
from rankwise.tokenise import encode_answer_set, pad_left
from rankwise.trees.build import token_tree
from rankwise.trees.scoring import answer_log_probabilities_of
from rankwise.trees.support import why_no_trees

GENERATED = 20  # tokens that the papers let a model write


class EncodedCase(NamedTuple):
    """Token ids of a prompt and of each candidate's answer."""

    prompt: list[int]
    answers: list[list[int]]


def encode_cases(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[Sequence[str]],
    context: int,
    least_room: int = 0,
) -> tuple[list[EncodedCase], int]:
    """Token ids of evaluation cases, and how many prompts were cut on the left.

    A prompt leaves room for its longest answer, and for what the papers' protocol generates.

    Args:
        tokenizer: the model's.
        prompts: one text a case.
        answers: one list of texts a case; lists may differ in length.
        context: most tokens of a prompt with an answer.
        least_room: tokens that a prompt leaves in any case, such as those of the longest title of a catalogue.

    Raises:
        UserError: a candidate alone does not fit.
    """
    cases, cut = [], 0
    for prompt, texts in zip(prompts, answers, strict=True):
        made = encode_answer_set(tokenizer, prompt, texts, context, max(GENERATED, least_room))
        if made is None:
            longest = max(texts, key=len)
            raise UserError(f"candidate {longest[:80]!r} does not fit {context} tokens: raise model.context")
        cases.append(EncodedCase(made[0], made[1]))
        cut += made[2]
    return cases, cut


@torch.no_grad()
def score_candidates(
    model: nn.Module, cases: Sequence[EncodedCase], padding: int, batch_tokens: int = 16384
) -> list[Scores]:
    """Summed log-probability, in nats, of every candidate's answer after its prompt, end-of-text token included.

    A case is one row, the token tree of its prompt and its answers. Where the model takes no trees, each candidate
    continues a copy of its prompt's keys and values, or, where an adapter puts virtual tokens before the prompt, is a
    row of its own with it. The scores equal those of separate sequences up to rounding,
    whatever the batch.

    Args:
        model: a causal language model, adapted or not, in evaluation mode.
        cases: as :func:`encode_cases` makes them.
        padding: id that fills short rows.
        batch_tokens: most tokens of a batch, padding included: of its rows, or of its cache, where each candidate has
            its prompt's.

    Returns:
        For each case an array with one score a candidate.
    """
    longest = max((len(prompt) + max(map(len, answers)) for prompt, answers in cases), default=0)
    if cases and not why_no_trees(model, longest):
        trees = [token_tree(prompt, answers) for prompt, answers in cases]
        return [np.array(found) for found in answer_log_probabilities_of(model, trees, padding, batch_tokens)]
    if has_virtual_tokens(model):
        return _score_apart(model, cases, padding, batch_tokens)
    return score_continued(model, cases, padding, batch_tokens)


@torch.no_grad()
def score_continued(
    model: nn.Module, cases: Sequence[EncodedCase], padding: int, batch_tokens: int = 16384
) -> list[Scores]:
    """The same with a cache: prompts of a batch are read once, without logits but for their last position."""
    scores: list[Scores] = [np.zeros(0)] * len(cases)
    most = tokens_for_logits(model, batch_tokens)
    for picked in _batches(cases, batch_tokens, most):
        found = _score_batch(model, [cases[index] for index in picked], padding)
        for index, values in zip(picked, found, strict=True):
            scores[index] = values
    return scores


def _score_apart(model: nn.Module, cases: Sequence[EncodedCase], padding: int, batch_tokens: int) -> list[Scores]:
    """The same with a row for each candidate, its prompt before it."""
    rows = [([*prompt, *answer], len(answer)) for prompt, answers in cases for answer in answers]
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index][0]))
    device, totals = next(model.parameters()).device, np.zeros(len(rows))
    while order:
        width = len(rows[order[0]][0])
        picked, order = order[: max(1, batch_tokens // width)], order[max(1, batch_tokens // width) :]
        ids, mask = pad_left([rows[index][0] for index in picked], padding)
        ends = torch.tensor([rows[index][1] for index in picked])[:, None]
        labels = ids.masked_fill(torch.arange(width) < width - ends, -100)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        values, _ = answer_log_probabilities(model, {name: tensor.to(device) for name, tensor in batch.items()})
        totals[picked] = values.sum(dim=1).double().cpu().numpy()
    return list(np.split(totals, np.cumsum([len(answers) for _, answers in cases])[:-1]))


def _batches(encoded: Sequence[EncodedCase], batch_tokens: int, answer_tokens: int) -> Iterator[list[int]]:
    """Indices of cases of similar length whose candidates, each padded and after a prompt of its own, fit the cache."""
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index][0]), reverse=True)
    batch: list[int] = []
    width = answers = longest = 0
    for index in order:
        prompt, candidates = encoded[index]
        width, answers = max(width, len(prompt)), answers + len(candidates)
        longest = max(longest, *map(len, candidates))
        if batch and (answers * (width + longest) > batch_tokens or answers * longest > answer_tokens):
            yield batch
            batch, width, answers, longest = [], len(prompt), len(candidates), max(map(len, candidates))
        batch.append(index)
    if batch:
        yield batch


def _score_batch(model: nn.Module, cases: Sequence[EncodedCase], padding: int) -> list[Scores]:
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
    losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return -losses.view(targets.shape) * real[:, 1:]


def _pad_right(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of one length, filled with -1."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows])
