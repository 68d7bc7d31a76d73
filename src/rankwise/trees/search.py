"""The best answers of a catalogue without scoring all of it: best-first search in the trie, exact by a bound.

A token's log-probability is never above 0, so that no answer is more probable than any beginning of it. What is known
of a beginning bounds all answers that go on from it, and a branch whose bound is below the answers found so far is
never read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate
from itertools import count as counted
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from rankwise.errors import UserError
from rankwise.likelihood import last_logits_and_cache, tokens_for_logits
from rankwise.tokenise import pad_left
from rankwise.trees.catalogue import batches, catalogue_scores, dense_attention, edge_log_probabilities
from rankwise.trees.frontier import MOST, Branch, Frontier, TopAnswers
from rankwise.trees.masks import as_taken
from rankwise.trees.memory import Memory
from rankwise.trees.support import why_no_trees
from rankwise.trees.trie import CatalogueTrie

SHARE = 0.25  # of the trie: a search that has read as much gives way to the whole walk
EXPECTED = 1024  # nodes that a prompt may be expected to keep at most
NOT_A_NUMBER = "the model's scores are NaN: its weights or its adapter are broken, or its precision is too low"


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
    prompt that has read a quarter of the trie gets the whole walk instead.

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
    searches = [Frontier(trie, count, places, length_normalised, most) for places in barred]
    if why_no_trees(model, max(map(len, prompts)) + trie.longest - 1):  # the whole ranking warns, and says why
        return _walked(model, prompts, searches, range(len(prompts)), padding, batch_tokens)
    lengths = [len(prompt) + min(most, EXPECTED) for prompt in prompts]
    for picked in batches(lengths, batch_tokens, max(1, tokens_for_logits(model, 2**30) // MOST)):
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
    searches: Sequence[Frontier],
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


def _search(model: nn.Module, prompts: Sequence[Sequence[int]], searches: Sequence[Frontier], padding: int) -> None:
    """Read on for all prompts together, until each search is over."""
    device = next(model.parameters()).device
    ids, own = (tensor.to(device) for tensor in pad_left(prompts, padding))
    logits, cache = last_logits_and_cache(model, ids, own)
    first = searches[0].trie.first
    roots = edge_log_probabilities(logits[:, None], torch.zeros_like(first), first)
    for search, values in zip(searches, _checked(roots).double().tolist(), strict=True):
        for edge, value in enumerate(values):
            search.reach(edge, value, ())
    memory, lengths, seen, left = Memory(cache), own.sum(dim=1), own.bool(), list(searches)
    while True:
        taken = [search.take() for search in left]
        going = [row for row, branches in enumerate(taken) if branches]
        if not going:
            return
        if len(going) < len(left):
            rows = torch.tensor(going, device=device)
            memory.select(rows)
            lengths, seen = lengths[rows], seen[rows]
            left, taken = [left[row] for row in going], [taken[row] for row in going]
        _read(model, memory, lengths, seen, left, taken)


def _checked(scores: Tensor) -> Tensor:
    if scores.isnan().any():
        raise UserError(NOT_A_NUMBER)
    return scores


class _Step(NamedTuple):
    """Branches of each prompt as rows, filled on the right; columns are what is recalled, and then the nodes.

    Attributes:
        recalled: slots of the nodes that the branches go on from, filled on the left.
        nodes: numbers of what is read.
        sees: which columns each node sees.
        kept: columns of the nodes that others may go on from, filled on the left.
        slots: of each branch, in order, the one that its node gets if it is kept.
        sources: of each edge that leaves the nodes, the place of its node among all nodes.
        targets: of each edge, its token.
        edges: how many edges leave each branch.
    """

    recalled: Int[Tensor, "prompts recalled"]
    nodes: Int[Tensor, "prompts width"]
    sees: Bool[Tensor, "prompts width columns"]
    kept: Int[Tensor, "prompts kept"]
    slots: list[int]
    sources: Int[Tensor, " edges"]
    targets: Int[Tensor, " edges"]
    edges: list[int]


def _step(trie: CatalogueTrie, taken: Sequence[Sequence[Branch]], slots: int) -> _Step:
    """What is read next, where ``slots`` are taken."""
    paths = [sorted({slot for branch in branches for slot in branch.path}) for branches in taken]
    recalled, _ = pad_left(paths, 0)
    width = max(sum(map(len, branches)) for branches in taken)
    nodes = torch.zeros(len(taken), width, dtype=torch.long)
    for row, branches in enumerate(taken):
        picked = [node for branch in branches for node in range(branch.first, branch.after)]
        nodes[row, : len(picked)] = torch.tensor(picked)
    kept = [[place for place, branch in _placed(branches) if not branch.whole] for branches in taken]
    sees = [_sees(trie, branches, path, recalled.shape[1], width) for branches, path in zip(taken, paths, strict=True)]
    sources, targets = _edges(trie, taken, width)
    return _Step(
        recalled=recalled,
        nodes=nodes,
        sees=torch.from_numpy(np.stack(sees)),
        kept=pad_left(kept, 0)[0],
        slots=_slots(taken, slots + max(map(len, kept))),
        sources=torch.cat(sources),
        targets=torch.cat(targets),
        edges=list(map(len, targets)),
    )


def _placed(branches: Sequence[Branch]) -> Iterator[tuple[int, Branch]]:
    """Each branch after the number of nodes before it."""
    return zip(accumulate(map(len, branches), initial=0), branches, strict=False)


def _sees(
    trie: CatalogueTrie, branches: Sequence[Branch], path: Sequence[int], behind: int, width: int
) -> Bool[np.ndarray, "width columns"]:
    """Which columns each node of a row sees: those of its path, which are the last ones of what is recalled."""
    sees = np.zeros((width, behind + width), dtype=bool)
    sees[np.arange(width), behind + np.arange(width)] = True  # filling sees itself: some attention fails on nothing
    columns = dict(zip(path, range(behind - len(path), behind), strict=True))
    for place, branch in _placed(branches):
        nodes, ends = np.arange(branch.first, branch.after), trie.ends[branch.first : branch.after].numpy()
        among = slice(place, place + len(branch))
        sees[among, behind + place : behind + place + len(branch)] = (nodes[:, None] >= nodes) & (nodes[:, None] < ends)
        sees[among, [columns[slot] for slot in branch.path]] = True
    return sees


def _slots(taken: Sequence[Sequence[Branch]], after: int) -> list[int]:
    """Of each branch the slot of its node, the last one of a row before ``after``; -1 where it is not kept."""
    found = []
    for branches in taken:
        free = counted(after - sum(not branch.whole for branch in branches))
        found += [-1 if branch.whole else next(free) for branch in branches]
    return found


def _edges(
    trie: CatalogueTrie, taken: Sequence[Sequence[Branch]], width: int
) -> tuple[list[Int[Tensor, " _edges"]], list[Int[Tensor, " _edges"]]]:
    """Of the edges that leave each branch, the places of their nodes among all nodes, and their tokens."""
    sources, targets = [], []
    for row, branches in enumerate(taken):
        for place, branch in _placed(branches):
            edges = slice(trie.starts[branch.first], trie.starts[branch.after])
            sources.append(row * width + place - branch.first + trie.sources[edges])
            targets.append(trie.targets[edges])
    return sources, targets


def _read(
    model: nn.Module,
    memory: Memory,
    lengths: Tensor,
    seen: Bool[Tensor, "prompts length"],
    searches: Sequence[Frontier],
    taken: Sequence[Sequence[Branch]],
) -> None:
    """Read branches of each prompt, keep what others may go on from, and tell the searches."""
    trie, device = searches[0].trie, lengths.device
    step = _step(trie, taken, memory.slots)
    width = step.nodes.shape[1]
    before = seen[:, None].expand(-1, width, -1)
    cache = memory.recall(step.recalled.to(device))
    output = model(
        input_ids=trie.tokens[step.nodes].to(device),
        attention_mask=as_taken(model, torch.cat([before, step.sees.to(device)], dim=2)[:, None]),
        position_ids=lengths[:, None] - 1 + trie.depths[step.nodes].to(device),
        past_key_values=cache,
        use_cache=True,
    )
    memory.keep(cache, cache.get_seq_length() - width + step.kept.to(device))
    flat = output.logits.flatten(0, 1)[None]
    values = _checked(edge_log_probabilities(flat, step.sources, step.targets)[0].double().cpu())
    owners = [(search, branch) for search, branches in zip(searches, taken, strict=True) for branch in branches]
    parts = torch.split(values, step.edges)
    for (search, branch), slot, part in zip(owners, step.slots, parts, strict=True):
        search.learn(branch, slot, part.tolist())
