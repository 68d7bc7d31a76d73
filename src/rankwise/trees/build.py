"""A prompt with its answers as one token tree: what they share stands in it once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from rankwise.errors import UserError


@dataclass(frozen=True)
class TokenTree:
    """Tokens in depth-first order, such that the descendants of a token follow it without a gap.

    Only tokens that something is predicted from are in it: the prompt, and those of an answer that another one follows.
    An answer's last token is an edge and no node, unless a longer answer goes on from it.

    Attributes:
        tokens: ids of the nodes; the prompt comes first, as a chain.
        depths: of each node, its position in its own sequence, from 0.
        ends: of each node, the index after its last descendant: node q sees node k where ``k <= q < ends[k]``.
        sources: of each edge, the node from which its token is predicted.
        targets: of each edge, the token's id; no two edges have the same source and target.
        paths: of each answer, in the order given, its edges from the prompt on.
    """

    tokens: list[int]
    depths: list[int]
    ends: list[int]
    sources: list[int]
    targets: list[int]
    paths: list[list[int]]

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def longest(self) -> int:
        """Nodes of the longest sequence."""
        return max(self.depths) + 1


def token_tree(prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> TokenTree:
    """Build the tree of a prompt and any number of answers; equal beginnings are shared, equal answers too.

    Args:
        prompt: token ids, one or more.
        answers: token ids of each, one or more; one may be the beginning of another.

    Raises:
        UserError: the prompt, the answers or one of them is empty.
    """
    if not prompt:
        raise UserError("a token tree needs a prompt of at least one token: an answer's first is predicted from it")
    if not answers or not all(answers):
        which = "there is none" if not answers else f"answer {[bool(a) for a in answers].index(False)} is empty"
        raise UserError(f"a token tree needs answers of at least one token each, and {which}")
    return _Builder(prompt, answers).tree()


class _Builder:
    """Adds answers in lexicographic order: what an answer shares, it shares with the one before it."""

    def __init__(self, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> None:
        self.tokens, self.depths = list(prompt), list(range(len(prompt)))
        self.ends = [0] * len(prompt)
        self.sources: list[int] = []
        self.targets: list[int] = []
        self.paths: list[list[int]] = [[] for _ in answers]
        # Of the answer in hand: its nodes, the prompt's end first, and its edges; node i + 1 has the token of edge i.
        self.nodes, self.edges = [len(prompt) - 1], list[int]()
        before: Sequence[int] = ()
        for index in sorted(range(len(answers)), key=lambda index: tuple(answers[index])):
            self._add(answers[index], _common(before, answers[index]))
            self.paths[index] = list(self.edges)
            before = answers[index]
        self._close(0)
        self.ends[: len(prompt)] = [len(self.tokens)] * len(prompt)

    def _add(self, answer: Sequence[int], shared: int) -> None:
        self._close(shared)
        for place in range(shared, len(answer)):
            if place == len(self.nodes):  # the token before is a node only now that something follows it
                self._open_node(self.targets[self.edges[place - 1]])
            self.sources.append(self.nodes[place])
            self.targets.append(answer[place])
            self.edges.append(len(self.targets) - 1)

    def _open_node(self, token: int) -> None:
        self.depths.append(self.depths[self.nodes[-1]] + 1)
        self.nodes.append(len(self.tokens))
        self.tokens.append(token)
        self.ends.append(0)

    def _close(self, shared: int) -> None:
        """Go back to what is shared: the nodes beyond it have all their descendants."""
        for node in self.nodes[shared + 1 :]:
            self.ends[node] = len(self.tokens)
        del self.nodes[shared + 1 :], self.edges[shared:]

    def tree(self) -> TokenTree:
        return TokenTree(self.tokens, self.depths, self.ends, self.sources, self.targets, self.paths)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning."""
    for place, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return place
    return min(len(first), len(second))
