"""What a search in a catalogue's trie has found for a prompt, and what it has yet to read."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rankwise.trees.trie import CatalogueTrie

LEAST, MOST = 32, 256  # nodes that a prompt reads at a time: few at first, for a model that is sure of its answer
WHOLE = 4  # nodes of a branch that is read at once, to its leaves


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


class Branch(NamedTuple):
    """Nodes that are read together: one, or one with all its descendants.

    Attributes:
        first: number of the first node.
        after: the number after the last one.
        total: log-probability up to the first, in nats.
        path: slots in which the keys and values of its ancestors are kept.
        whole: whether it is read to its leaves, so that nothing goes on from it later.
    """

    first: int
    after: int
    total: float
    path: tuple[int, ...]
    whole: bool

    def __len__(self) -> int:
        return self.after - self.first


@dataclass
class Frontier:
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

    def take(self) -> list[Branch]:
        """The branches to read next, the best first, as many nodes as have been read so far; none at the end."""
        step = max(LEAST, min(MOST, self.read))
        taken: list[Branch] = []
        nodes = 0
        while self.frontier and nodes < step and self.read + nodes < self.most:
            bound, node, total, path = self.frontier[0]
            if -bound < self.enough:
                self.frontier.clear()
                break
            size = self.trie.sizes[node]
            whole = size <= WHOLE
            count = size if whole else 1
            if taken and nodes + count > step:
                break
            heapq.heappop(self.frontier)
            taken.append(Branch(node, node + count, total, path, whole))
            nodes += count
        self.read += nodes
        return taken

    def learn(self, branch: Branch, slot: int, values: Sequence[float]) -> None:
        """The log-probabilities of the edges that leave a branch, whose node is kept in ``slot`` unless it is whole."""
        starts, totals = self.trie.starts, {branch.first: branch.total}
        path = None if branch.whole else (*branch.path, slot)
        edges = range(starts[branch.first], starts[branch.after])
        sources = self.trie.source_list
        for edge, value in zip(edges, values, strict=True):
            total = totals[sources[edge]] + value
            if branch.whole and (child := self.trie.children[edge]):
                totals[child] = total
            self.reach(edge, total, path)

    def result(self) -> TopAnswers:
        """What was found, and whether anything that is left could be better."""
        best = sorted(self.found, key=lambda entry: (-entry[0], -entry[1]))
        exact = not self.frontier or -self.frontier[0][0] < self.enough
        return TopAnswers([-place for _, place in best], [score for score, _ in best], self.read, exact)
