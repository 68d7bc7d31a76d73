"""A whole catalogue of answers scored for a prompt: one trie of answers, walked after the prompt's keys and values."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from rankwise.errors import UserError
from rankwise.likelihood import (
    answer_log_probabilities,
    last_logits_and_cache,
    target_log_probabilities,
    tokens_for_logits,
    unwrapped,
)
from rankwise.tokenise import IGNORED, pad_left
from rankwise.trees.masks import FLEX, as_taken, attention_of, dense_mask
from rankwise.trees.support import why_no_trees
from rankwise.trees.trie import CatalogueTrie, Chunk

CHUNK = 256  # nodes; measured best for narrow models: in wider ones attention costs more than it saves


def score_catalogue(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    trie: CatalogueTrie,
    padding: int,
    batch_tokens: int = 16384,
    chunk: int = CHUNK,
) -> Float[Tensor, "prompts answers"]:
    """Summed log-probability of every answer of the catalogue after every prompt, as `catalogue_scores` gives them.

    Returns:
        In nats, float32 at least, on the CPU: one number for each prompt and answer, all in memory.
    """
    rows: list[Tensor] = [torch.empty(0)] * len(prompts)
    for picked, found in catalogue_scores(model, prompts, trie, padding, batch_tokens, chunk):
        for index, scores in zip(picked, found.cpu(), strict=True):
            rows[index] = scores
    return torch.stack(rows)


def catalogue_scores(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    trie: CatalogueTrie,
    padding: int,
    batch_tokens: int = 16384,
    chunk: int = CHUNK,
) -> Iterator[tuple[list[int], Float[Tensor, "some answers"]]]:
    """Score the catalogue for a few prompts of similar length at a time, so that not all scores are in memory at once.

    The prompts of a batch are read once and their keys and values kept; the trie goes after them in chunks. Scores
    equal those of separate sequences up to rounding, whatever the batches and chunks. A model that takes no trees is
    given separate sequences, with a warning that says why.

    Args:
        model: a causal language model, adapted or not, in evaluation mode.
        prompts: token ids of each, one or more; with the longest answer they fit the model's positions.
        trie: the answers.
        padding: id that fills short prompts.
        batch_tokens: most tokens of a batch, prompts and a chunk for each, unless a single prompt has more.
        chunk: most nodes of the trie at a time; fewer where the vocabulary is so wide that logits fill the memory.

    Yields:
        Places of some prompts, and their scores in nats, float32 at least, on the model's device, without gradients.

    Raises:
        UserError: there is no prompt, or one is empty.
    """
    if not prompts or not all(prompts):
        which = f"prompt {[bool(p) for p in prompts].index(False) + 1} is empty" if prompts else "there is none"
        raise UserError(f"a catalogue is scored after prompts of at least one token each, and {which}")
    reason = why_no_trees(model, max(map(len, prompts)) + trie.longest - 1)
    if reason:
        warnings.warn(f"every answer of the catalogue is read with a prompt of its own: {reason}", stacklevel=2)
        for index, prompt in enumerate(prompts):
            yield [index], separate_log_probabilities(model, prompt, trie.answers, batch_tokens)[None]
        return
    most = tokens_for_logits(model, batch_tokens)
    nodes = min(chunk, most, max(trie.nodes, 1))
    for picked in batches([len(prompt) + nodes for prompt in prompts], batch_tokens, most // nodes):
        with dense_attention(model):
            scores = _score_batch(model, [prompts[index] for index in picked], trie, padding, nodes)
        yield picked, scores


def batches(lengths: Sequence[int], batch_tokens: int, most: int) -> Iterator[list[int]]:
    """Places of rows whose lengths are alike, longest first: at most so many tokens, padding included, and rows."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    while order:
        count = max(1, min(batch_tokens // lengths[order[0]], most))
        yield order[:count]
        order = order[count:]


@torch.no_grad()
def _score_batch(
    model: nn.Module, prompts: Sequence[Sequence[int]], trie: CatalogueTrie, padding: int, nodes: int
) -> Float[Tensor, "prompts answers"]:
    device = next(model.parameters()).device
    ids, own = (tensor.to(device) for tensor in pad_left(prompts, padding))
    logits, cache = last_logits_and_cache(model, ids, own)  # no layer of it forgets what a window leaves
    first = edge_log_probabilities(logits[:, None], torch.zeros_like(trie.first), trie.first)
    edges = first.new_empty(len(prompts), trie.edges)
    edges[:, : len(trie.first)] = first
    for chunk in trie.chunks(nodes):
        logits = _continue(model, cache, own.bool(), chunk)
        edges[:, chunk.place] = edge_log_probabilities(logits, chunk.sources, chunk.targets)
    return trie.totals(edges)


def edge_log_probabilities(
    logits: Float[Tensor, "prompts nodes vocabulary"], sources: Int[Tensor, " edges"], targets: Int[Tensor, " edges"]
) -> Float[Tensor, "prompts edges"]:
    """Of each edge after each prompt, in nats, float32 at least; sources are places of nodes in the logits."""
    prompts, nodes, _ = logits.shape
    rows = nodes * torch.arange(prompts)[:, None] + sources
    rows, columns = (tensor.flatten().to(logits.device) for tensor in (rows, targets.expand(prompts, -1)))
    return target_log_probabilities(logits.flatten(0, 1), rows, columns).view(prompts, -1)


def _continue(
    model: nn.Module, cache: DynamicCache, own: Bool[Tensor, "prompts length"], chunk: Chunk
) -> Float[Tensor, "prompts nodes vocabulary"]:
    """Logits at the chunk's nodes after each prompt; the cache is left as it was."""
    prompts, nodes, device = len(own), len(chunk.tokens), own.device
    before = own[:, None, None].expand(-1, -1, nodes, -1)
    among = dense_mask(chunk.ends[None].to(device)).expand(prompts, -1, -1, -1)
    output = model(
        input_ids=chunk.tokens.to(device).expand(prompts, -1),
        attention_mask=as_taken(model, torch.cat([before, among], dim=3)),
        position_ids=own.sum(dim=1, keepdim=True) - 1 + chunk.depths.to(device),
        past_key_values=cache,
        use_cache=True,
    )
    cache.crop(-nodes)
    logits: Tensor = output.logits
    return logits


@contextlib.contextmanager
def dense_attention(model: nn.Module) -> Iterator[None]:
    """Within it eager attention stands in for FlexAttention, which would be compiled anew for each shape."""
    own = attention_of(model)
    if own == FLEX:
        unwrapped(model).set_attn_implementation("eager")
    try:
        yield
    finally:
        if own == FLEX:
            unwrapped(model).set_attn_implementation(own)


@torch.no_grad()
def separate_log_probabilities(
    model: nn.Module, prompt: Sequence[int], answers: Sequence[Sequence[int]], batch_tokens: int = 16384
) -> Float[Tensor, " answers"]:
    """Summed log-probability of each answer, in nats, each read with a prompt of its own.

    Only answers of one length share a batch, so that nothing is padded: this is right for any causal model, also for
    one whose layers carry a state from token to token.

    Args:
        model: in evaluation mode.
        prompt: token ids, one or more.
        answers: token ids of each, one or more.
        batch_tokens: most tokens of a batch, unless a single sequence has more.
    """
    device = next(model.parameters()).device
    by_length: dict[int, list[int]] = {}
    for index, answer in enumerate(answers):
        by_length.setdefault(len(answer), []).append(index)
    most = tokens_for_logits(model, batch_tokens)
    found, places = [], []
    for length, indices in by_length.items():
        size = max(1, min(batch_tokens // (len(prompt) + length), most // length))
        for start in range(0, len(indices), size):
            picked = indices[start : start + size]
            ids = torch.tensor([[*prompt, *answers[index]] for index in picked], device=device)
            labels = torch.cat([torch.full_like(ids[:, :-length], IGNORED), ids[:, -length:]], dim=1)
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
            found.append(answer_log_probabilities(model, batch)[0].sum(dim=1))
            places += picked
    return torch.cat(found)[torch.tensor(places).argsort().to(device)]
