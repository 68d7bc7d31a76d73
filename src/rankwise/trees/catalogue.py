"""A whole catalogue of answers scored for a prompt: one trie of answers, walked after the prompt's keys and values."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

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
from rankwise.trees.build import token_tree
from rankwise.trees.masks import FLEX, as_taken, attention_of, dense_mask
from rankwise.trees.support import why_no_trees

CHUNK = 256  # nodes; measured best for narrow models: in wider ones attention costs more than it saves


@dataclass(frozen=True)
class Chunk:
    """Nodes that go through the model together: some in depth-first order, and before them the path to the first.

    Attributes:
        tokens: ids of the nodes.
        depths: of each node, 1 for an answer's first token.
        ends: of each node, the place after its last descendant, which may lie beyond the chunk.
        place: of the edges that leave the nodes behind the path, among all edges.
        sources: of each of these edges, its node's place in the chunk.
        targets: of each of these edges, the token's id.
    """

    tokens: Int[Tensor, " nodes"]
    depths: Int[Tensor, " nodes"]
    ends: Int[Tensor, " nodes"]
    place: slice
    sources: Int[Tensor, " edges"]
    targets: Int[Tensor, " edges"]


class CatalogueTrie:
    """Answers as one token trie that stands after any prompt: equal beginnings are in it once.

    Args:
        answers: token ids of each, one or more; one may be the beginning of another, and some may be equal.

    Attributes:
        answers: as given.
        lengths: tokens of each answer.
        longest: tokens of the longest, for which a prompt has to leave room.
        nodes: how many tokens something is predicted from, the prompt's aside.
        first: ids of the tokens that an answer begins with; their edges come first.

    Raises:
        UserError: there is no answer, or one is empty.
    """

    def __init__(self, answers: Sequence[Sequence[int]]) -> None:
        tree = token_tree([0], answers)  # node 0 stands for the last token of any prompt
        self.answers = answers
        self.lengths = torch.tensor([len(answer) for answer in answers])
        self.longest, self.nodes = int(self.lengths.max()), len(tree) - 1
        self._tokens, self._depths, self._ends = map(torch.tensor, (tree.tokens, tree.depths, tree.ends))
        self._sources, order = torch.tensor(tree.sources).sort(stable=True)
        self._targets, places = torch.tensor(tree.targets)[order], order.argsort()
        self.first = self._targets[self._sources == 0]
        leading = {tree.sources[edge]: before for path in tree.paths for before, edge in pairwise(path)}
        into = places[torch.tensor([leading.get(node, 0) for node in range(len(tree))])]  # the edge to each node
        self._parents = self._sources[into].tolist()
        self._before = into[self._sources]  # of each edge, the one that leads to its source; none to node 0
        depths = self._depths[self._sources]
        self._levels = [(depths == depth).nonzero()[:, 0] for depth in range(1, self.longest)]
        self._last = places[torch.tensor([path[-1] for path in tree.paths])]

    def __len__(self) -> int:
        return len(self.answers)

    def chunks(self, most: int) -> Iterator[Chunk]:
        """Chunks of at most ``most`` nodes, unless a path alone is longer; each node stands behind the path once."""
        first = 1
        while first <= self.nodes:
            path = self._path(first)
            after = min(first + max(1, most - len(path)), self.nodes + 1)
            yield self._chunk(path, first, after)
            first = after

    def _path(self, node: int) -> list[int]:
        above: list[int] = []
        while node := self._parents[node]:
            above.append(node)
        return above[::-1]

    def _chunk(self, path: list[int], first: int, after: int) -> Chunk:
        picked = torch.tensor([*path, *range(first, after)])
        start, stop = torch.searchsorted(self._sources, torch.tensor([first, after])).tolist()
        place = slice(start, stop)
        return Chunk(
            tokens=self._tokens[picked],
            depths=self._depths[picked],
            ends=self._ends[picked] - first + len(path),
            place=place,
            sources=self._sources[place] - first + len(path),
            targets=self._targets[place],
        )

    def totals(self, edges: Float[Tensor, "prompts edges"]) -> Float[Tensor, "prompts answers"]:
        """Summed log-probability of each answer, from those of all edges; these are overwritten."""
        before, last = self._before.to(edges.device), self._last.to(edges.device)
        for level in self._levels:  # downwards: the sum up to an edge is that up to the one before, and its own
            level = level.to(edges.device)
            edges[:, level] += edges[:, before[level]]
        return edges[:, last]

    @property
    def edges(self) -> int:
        """How many tokens of answers are predicted, each shared one once."""
        return len(self._targets)


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
    for picked in _batches([len(prompt) + nodes for prompt in prompts], batch_tokens, most // nodes):
        with _dense_attention(model):
            scores = _score_batch(model, [prompts[index] for index in picked], trie, padding, nodes)
        yield picked, scores


def _batches(lengths: Sequence[int], batch_tokens: int, most: int) -> Iterator[list[int]]:
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
    first = _log_probabilities(logits[:, None], torch.zeros_like(trie.first), trie.first)
    edges = first.new_empty(len(prompts), trie.edges)
    edges[:, : len(trie.first)] = first
    for chunk in trie.chunks(nodes):
        logits = _continue(model, cache, own.bool(), chunk)
        edges[:, chunk.place] = _log_probabilities(logits, chunk.sources, chunk.targets)
    return trie.totals(edges)


def _log_probabilities(
    logits: Float[Tensor, "prompts nodes vocabulary"], sources: Int[Tensor, " edges"], targets: Int[Tensor, " edges"]
) -> Float[Tensor, "prompts edges"]:
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
def _dense_attention(model: nn.Module) -> Iterator[None]:
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
