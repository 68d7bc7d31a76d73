"""A catalogue's answers as one token trie that stands after any prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rankwise.trees.build import token_tree


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
        nodes: how many tokens something is predicted from, the prompt's aside: they are numbered from 1, depth first.
        first: ids of the tokens that an answer begins with; their edges come first.
        tokens: ids of the nodes; 0 stands for the last token of any prompt.
        depths: of each node, 1 for an answer's first token.
        ends: of each node, the number after its last descendant.
        sources: of each edge, the node that its token is predicted from; edges are in the order of their sources.
        targets: of each edge, the token's id.
        last: of each answer, its last edge.

    Raises:
        UserError: there is no answer, or one is empty.
    """

    def __init__(self, answers: Sequence[Sequence[int]]) -> None:
        tree = token_tree([0], answers)  # node 0 stands for the last token of any prompt
        self.answers = answers
        self.lengths = torch.tensor([len(answer) for answer in answers])
        self.longest, self.nodes = int(self.lengths.max()), len(tree) - 1
        self.tokens, self.depths, self.ends = map(torch.tensor, (tree.tokens, tree.depths, tree.ends))
        self.sources, order = torch.tensor(tree.sources).sort(stable=True)
        self.targets, places = torch.tensor(tree.targets)[order], order.argsort()
        self.first = self.targets[self.sources == 0]
        leading = {tree.sources[edge]: before for path in tree.paths for before, edge in pairwise(path)}
        into = places[torch.tensor([leading.get(node, 0) for node in range(len(tree))])]  # the edge to each node
        self._into = into
        self._parents = self.sources[into].tolist()
        self._before = into[self.sources]  # of each edge, the one that leads to its source; none to node 0
        depths = self.depths[self.sources]
        self._levels = [(depths == depth).nonzero()[:, 0] for depth in range(1, self.longest)]
        self.last = places[torch.tensor([path[-1] for path in tree.paths])]

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
        start, stop = torch.searchsorted(self.sources, torch.tensor([first, after])).tolist()
        place = slice(start, stop)
        return Chunk(
            tokens=self.tokens[picked],
            depths=self.depths[picked],
            ends=self.ends[picked] - first + len(path),
            place=place,
            sources=self.sources[place] - first + len(path),
            targets=self.targets[place],
        )

    def totals(self, edges: Float[Tensor, "prompts edges"]) -> Float[Tensor, "prompts answers"]:
        """Summed log-probability of each answer, from those of all edges; these are overwritten."""
        before, last = self._before.to(edges.device), self.last.to(edges.device)
        for level in self._levels:  # downwards: the sum up to an edge is that up to the one before, and its own
            level = level.to(edges.device)
            edges[:, level] += edges[:, before[level]]
        return edges[:, last]

    @property
    def edges(self) -> int:
        """How many tokens of answers are predicted, each shared one once."""
        return len(self.targets)

    @cached_property
    def sizes(self) -> list[int]:
        """Of each node, how many nodes it and its descendants are."""
        found: list[int] = (self.ends - torch.arange(self.nodes + 1)).tolist()
        return found

    @cached_property
    def source_list(self) -> list[int]:
        """The sources as integers, which are read one by one far faster."""
        found: list[int] = self.sources.tolist()
        return found

    @cached_property
    def edge_depths(self) -> list[int]:
        """Of each edge, the tokens of an answer that ends with it."""
        found: list[int] = (self.depths[self.sources] + 1).tolist()
        return found

    @cached_property
    def starts(self) -> list[int]:
        """Of each node, its first edge; the one after the last node's is there too."""
        found: list[int] = torch.searchsorted(self.sources, torch.arange(self.nodes + 2)).tolist()
        return found

    @cached_property
    def children(self) -> list[int]:
        """Of each edge, the node that it leads to; 0 where an answer ends and none goes on."""
        found = [0] * self.edges
        for node, edge in enumerate(self._into[1:].tolist(), start=1):
            found[edge] = node
        return found

    @cached_property
    def answers_at(self) -> dict[int, list[int]]:
        """Of each edge at which answers end, their places."""
        found: dict[int, list[int]] = {}
        for place, edge in enumerate(self.last.tolist()):
            found.setdefault(edge, []).append(place)
        return found

    @cached_property
    def longest_through(self) -> list[int]:
        """Of each edge, the tokens of the longest answer that goes through it."""
        found, starts = [0] * self.edges, self.starts
        for node in range(self.nodes, -1, -1):  # from the leaves: descendants have larger numbers
            for edge in range(starts[node], starts[node + 1]):
                child = self.children[edge]
                below = found[starts[child] : starts[child + 1]] if child else []
                found[edge] = max([self.edge_depths[edge], *below])
        return found
