"""The best answers of a catalogue without scoring all of it: best-first search in the trie, exact by a bound.

A token's log-probability is never above 0, so that no answer is more probable than any beginning of it. What is known
of a beginning bounds all answers that go on from it, and a branch whose bound is below the answers found so far is
never read.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import DynamicCache

from rankwise.errors import UserError
from rankwise.likelihood import last_logits_and_cache, tokens_for_logits
from rankwise.tokenise import pad_left
from rankwise.trees.catalogue import batches, catalogue_scores, dense_attention, edge_log_probabilities
from rankwise.trees.masks import as_taken
from rankwise.trees.support import why_no_trees
from rankwise.trees.trie import CatalogueTrie

STEP = 32  # nodes that a prompt reads at a time
EXPECTED = 1024  # nodes that a prompt may be expected to read at most
WHOLE = 16  # nodes of a branch that is read at once, to its leaves
SHARE = 0.0625  # of the trie; a search that has read as much has cost about half of the whole walk
NOT_A_NUMBER = "the model's scores are NaN: its weights or its adapter are broken, or its precision is too low"


@dataclass(frozen=True)
class TopAnswers:
    """The best answers after a prompt.

    Attributes:
        places: of the answers in the catalogue, best first; at equal scores the one that comes first in it.
        scores: of each, in nats; per token where lengths are normalised.
        read: nodes of the trie that went through the model.
        exact: whether no other answer can be better: the search was not cut short.
    """

    places: list[int]
    scores: list[float]
    read: int
    exact: bool


class _Branch(NamedTuple):
    """Nodes that are read together: one, or one with all its descendants."""

    first: int
    after: int
    total: float  # log-probability up to the first
    path: tuple[int, ...]  # where its ancestors' keys and values stand behind the prompt's


@dataclass
class _Search:
    """What a prompt has found, and what it has yet to read."""

    trie: CatalogueTrie
    count: int
    barred: Collection[int]
    normalised: bool
    most: int
    read: int = 0
    found: list[tuple[float, int]] = field(default_factory=list)  # a heap: the worst first
    frontier: list[tuple[float, int, float, tuple[int, ...]]] = field(default_factory=list)  # a heap: the best first

    @property
    def enough(self) -> float:
        """What a bound must reach to matter."""
        return self.found[0][0] if len(self.found) == self.count else -float("inf")

    def reach(self, edge: int, total: float, path: tuple[int, ...] | None) -> None:
        """An edge of a known log-probability: answers that end there, and, with a path, the node that it leads to."""
        depth = self.trie.edge_depths[edge]
        for place in self.trie.answers_at.get(edge, ()):
            if place not in self.barred:
                entry = (total / depth if self.normalised else total, -place)
                push = heapq.heappush if len(self.found) < self.count else heapq.heappushpop
                push(self.found, entry)
        child = self.trie.children[edge]
        if child and path is not None:
            bound = total / self.trie.longest_through[edge] if self.normalised else total
            if bound >= self.enough:
                heapq.heappush(self.frontier, (-bound, child, total, path))

    def take(self, step: int) -> list[_Branch]:
        """The branches to read next, the best first, of about ``step`` nodes; none where the search is over."""
        taken: list[_Branch] = []
        nodes = 0
        while self.frontier and nodes < step and self.read + nodes < self.most:
            bound, node, total, path = self.frontier[0]
            if -bound < self.enough:
                self.frontier.clear()
                break
            size = self.trie.sizes[node]
            after = node + (size if size <= WHOLE else 1)
            if taken and nodes + after - node > step:
                break
            heapq.heappop(self.frontier)
            taken.append(_Branch(node, after, total, path))
            nodes += after - node
        self.read += nodes
        return taken

    def learn(self, branch: _Branch, place: int, values: Sequence[float]) -> None:
        """The log-probabilities of the edges that leave a branch, whose first node stands at ``place``."""
        starts, totals = self.trie.starts, {branch.first: branch.total}
        whole = branch.after - branch.first == self.trie.sizes[branch.first]
        path = None if whole else (*branch.path, place)
        edges = range(starts[branch.first], starts[branch.after])
        sources = self.trie.source_list
        for edge, value in zip(edges, values, strict=True):
            total = totals[sources[edge]] + value
            if whole and (child := self.trie.children[edge]):
                totals[child] = total
            self.reach(edge, total, path)

    def result(self) -> TopAnswers:
        """What was found, and whether anything that is left could be better."""
        best = sorted(self.found, key=lambda entry: (-entry[0], -entry[1]))
        exact = not self.frontier or -self.frontier[0][0] < self.enough
        return TopAnswers([-place for _, place in best], [score for score, _ in best], self.read, exact)


@torch.no_grad()
def top_answers(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    trie: CatalogueTrie,
    count: int,
    padding: int,
    *,
    excluded: Sequence[Collection[int]] | None = None,
    length_normalised: bool = False,
    most_nodes: int | None = None,
    batch_tokens: int = 16384,
) -> list[TopAnswers]:
    """The ``count`` answers with the highest log-probability after each prompt: those of the full ranking.

    Best-first search: of the beginnings that are known, those with the highest bounds are read next, a few at a time,
    each after the keys and values of its prompt and of what it goes on from. The bound of a beginning is its own
    log-probability; where lengths are normalised, that over the length of the longest answer that goes on from it. A
    prompt that has read a sixteenth of the trie gets the whole walk instead, which then costs less.

    Args:
        model: a causal language model, adapted or not, in evaluation mode.
        prompts: token ids of each, one or more; with the longest answer they fit the model's positions.
        trie: the answers of the catalogue.
        count: how many answers, 1 or more; a prompt with fewer left gets those.
        padding: id that fills rows.
        excluded: for each prompt, places of answers that it does not get, such as what the user has seen.
        length_normalised: whether answers are ranked by their mean log-probability of a token, and not by the sum.
        most_nodes: nodes of the trie that a prompt may read: a search that needs more ends there, is not exact, and
            says so. None for any number.
        batch_tokens: most tokens of a batch, prompts and what they may be expected to read of the trie.

    Returns:
        For each prompt, its best answers.

    Raises:
        UserError: there is no prompt, one is empty, ``count`` or ``most_nodes`` is below 1, or a score is NaN.
    """
    for name, value in (("count", count), ("most_nodes", most_nodes)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}: give 1 or more")
    if not prompts or not all(prompts):
        which = f"prompt {[bool(p) for p in prompts].index(False) + 1} is empty" if prompts else "there is none"
        raise UserError(f"answers are ranked after prompts of at least one token each, and {which}")
    barred = [frozenset(places) for places in excluded] if excluded is not None else [frozenset[int]()] * len(prompts)
    most = max(1, round(SHARE * trie.nodes)) if most_nodes is None else most_nodes
    searches = [_Search(trie, count, places, length_normalised, most) for places in barred]
    if why_no_trees(model, max(map(len, prompts)) + trie.longest - 1):  # the whole ranking warns, and says why
        return _walked(model, prompts, searches, range(len(prompts)), padding, batch_tokens)
    lengths = [len(prompt) + min(most, EXPECTED) for prompt in prompts]
    for picked in batches(lengths, batch_tokens, tokens_for_logits(model, 2**30) // STEP):
        with dense_attention(model):
            _search(model, [prompts[index] for index in picked], [searches[index] for index in picked], padding)
    found = [search.result() for search in searches]
    cut = [index for index, one in enumerate(found) if not one.exact and most_nodes is None]
    for index, one in zip(cut, _walked(model, prompts, searches, cut, padding, batch_tokens), strict=True):
        found[index] = one
    return found


def _walked(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    searches: Sequence[_Search],
    places: Sequence[int],
    padding: int,
    batch_tokens: int,
) -> list[TopAnswers]:
    """The same for some prompts by scoring all answers."""
    found: dict[int, TopAnswers] = {}
    if not places:
        return []
    trie = searches[0].trie
    chosen = [prompts[place] for place in places]
    for picked, scores in catalogue_scores(model, chosen, trie, padding, batch_tokens):
        for index, row in zip(picked, scores.double().cpu(), strict=True):
            search = searches[places[index]]
            values = _checked(row / trie.lengths if search.normalised else row)
            values[list(search.barred)] = -float("inf")
            best = values.sort(descending=True, stable=True).indices[
                : min(search.count, len(trie) - len(search.barred))
            ]
            found[index] = TopAnswers(best.tolist(), values[best].tolist(), search.read + trie.nodes, True)
    return [found[index] for index in range(len(places))]


def _search(model: nn.Module, prompts: Sequence[Sequence[int]], searches: Sequence[_Search], padding: int) -> None:
    """Read on for all prompts together, until each search is over."""
    device = next(model.parameters()).device
    ids, own = (tensor.to(device) for tensor in pad_left(prompts, padding))
    logits, cache = last_logits_and_cache(model, ids, own)
    first = searches[0].trie.first
    roots = edge_log_probabilities(logits[:, None], torch.zeros_like(first), first)
    for search, values in zip(searches, _checked(roots).double().tolist(), strict=True):
        for edge, value in enumerate(values):
            search.reach(edge, value, ())
    lengths, seen, left = own.sum(dim=1), own.bool(), list(searches)
    while True:
        taken = [search.take(STEP) for search in left]
        going = [row for row, branches in enumerate(taken) if branches]
        if not going:
            return
        if len(going) < len(left):
            rows = torch.tensor(going, device=device)
            cache.batch_select_indices(rows)
            lengths, seen = lengths[rows], seen[rows]
            left, taken = [left[row] for row in going], [taken[row] for row in going]
        _read(model, cache, lengths, seen, left, taken)


def _checked(scores: Tensor) -> Tensor:
    if scores.isnan().any():
        raise UserError(NOT_A_NUMBER)
    return scores


def _places(branches: Sequence[_Branch]) -> Iterator[tuple[int, _Branch]]:
    """Each branch with the number of nodes before it."""
    place = 0
    for branch in branches:
        yield place, branch
        place += branch.after - branch.first


def _within(trie: CatalogueTrie, first: int, after: int) -> Bool[np.ndarray, "nodes nodes"]:
    """Which nodes of a branch see which: those on their paths."""
    nodes, ends = np.arange(first, after), trie.ends[first:after].numpy()
    return (nodes[:, None] >= nodes) & (nodes[:, None] < ends)


def _read(
    model: nn.Module,
    cache: DynamicCache,
    lengths: Tensor,
    seen: Bool[Tensor, "prompts length"],
    searches: Sequence[_Search],
    taken: Sequence[Sequence[_Branch]],
) -> None:
    """Read branches of each prompt, whose keys and values stay in the cache, and tell the searches."""
    trie, device = searches[0].trie, lengths.device
    behind = cache.get_seq_length() - seen.shape[1]
    width = max(sum(branch.after - branch.first for branch in branches) for branches in taken)
    nodes = torch.zeros(len(taken), width, dtype=torch.long)
    sees = np.zeros((len(taken), width, behind + width), dtype=bool)
    sees[:, np.arange(width), behind + np.arange(width)] = True  # filling sees itself: some attention fails on nothing
    sources, targets, owners = [], [], []
    for row, branches in enumerate(taken):
        for place, branch in _places(branches):
            size = branch.after - branch.first
            nodes[row, place : place + size] = torch.arange(branch.first, branch.after)
            among = slice(place, place + size), slice(behind + place, behind + place + size)
            sees[row][among] = _within(trie, branch.first, branch.after)
            sees[row, place : place + size, list(branch.path)] = True
            edges = slice(trie.starts[branch.first], trie.starts[branch.after])
            sources.append(row * width + place - branch.first + trie.sources[edges])
            targets.append(trie.targets[edges])
            owners.append((searches[row], branch, behind + place))
    before = seen[:, None, None].expand(-1, -1, width, -1)
    mask = torch.cat([before, torch.from_numpy(sees)[:, None].to(device)], dim=3)
    output = model(
        input_ids=trie.tokens[nodes].to(device),
        attention_mask=as_taken(model, mask),
        position_ids=lengths[:, None] - 1 + trie.depths[nodes].to(device),
        past_key_values=cache,
        use_cache=True,
    )
    counts = [len(part) for part in targets]
    flat = output.logits.flatten(0, 1)[None]
    values = _checked(edge_log_probabilities(flat, torch.cat(sources), torch.cat(targets))[0].double().cpu())
    for (search, branch, place), part in zip(owners, torch.split(values, counts), strict=True):
        search.learn(branch, place, part.tolist())
