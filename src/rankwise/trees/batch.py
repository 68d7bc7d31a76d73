"""Trees as tensors: packed into rows of one width, with what is to be read off the model's output."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from rankwise.trees.build import TokenTree
from rankwise.trees.packing import pack

MULTIPLE_OF = 16


@dataclass(frozen=True)
class TreeBatch:
    """Rows of packed trees.

    Attributes:
        input_ids: tokens of the rows, filled on the right.
        position_ids: of each token in its own sequence; 0 at the filling.
        ends: of each token, the column after its last descendant in its row; a filling token has no descendant.
        reads: of each position that something is predicted from, its place in the flattened rows.
        edge_reads: of each edge, the place in ``reads`` of the position that predicts its token.
        edge_tokens: of each edge, the token.
        paths: edges of each answer; the number of edges, which is none of them, beyond its end.
        exists: which answers a tree has; those that it has come first.
    """

    input_ids: Int[Tensor, "rows width"]
    position_ids: Int[Tensor, "rows width"]
    ends: Int[Tensor, "rows width"]
    reads: Int[Tensor, " reads"]
    edge_reads: Int[Tensor, " edges"]
    edge_tokens: Int[Tensor, " edges"]
    paths: Int[Tensor, "trees answers steps"]
    exists: Bool[Tensor, "trees answers"]

    def to(self, device: torch.device | str) -> TreeBatch:
        """The same on a device."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return TreeBatch(**{name: tensor.to(device, non_blocking=True) for name, tensor in named.items()})


def batch_trees(
    trees: Sequence[TokenTree], padding: int, tokens_per_row: int | None = None, multiple_of: int = MULTIPLE_OF
) -> TreeBatch:
    """Pack trees into rows.

    Args:
        trees: one or more.
        padding: id that fills rows.
        tokens_per_row: most tokens of a row; a longer tree gets a row of its own. The longest tree's where not given:
            attention takes the square of a row's width, so that wider rows pay only for a device that is not filled.
        multiple_of: the width is rounded up to a multiple of this, so that few shapes occur.
    """
    longest = rounded_up(max(map(len, trees)), multiple_of)
    rows = pack([len(tree) for tree in trees], max(longest, (tokens_per_row or 0) // multiple_of * multiple_of))
    width = rounded_up(max(sum(len(trees[index]) for index in row) for row in rows), multiple_of)
    made = _Columns(padding, width)
    starts = [0] * len(trees)
    for number, row in enumerate(rows):
        made.row()
        for index in row:
            starts[index] = number * width + made.used
            made.add(trees[index])
    input_ids, position_ids, ends = (torch.tensor(column) for column in made.filled())
    return TreeBatch(input_ids, position_ids, ends, *_reading(trees, starts))


def rounded_up(length: int, multiple_of: int = MULTIPLE_OF) -> int:
    """The next multiple."""
    return -(-length // multiple_of) * multiple_of


class _Columns:
    """Rows that are being filled."""

    def __init__(self, padding: int, width: int) -> None:
        self.padding, self.width, self.used = padding, width, 0
        self.tokens: list[list[int]] = []
        self.depths: list[list[int]] = []
        self.ends: list[list[int]] = []

    def row(self) -> None:
        self.used = 0
        for column in (self.tokens, self.depths, self.ends):
            column.append([])

    def add(self, tree: TokenTree) -> None:
        self.tokens[-1] += tree.tokens
        self.depths[-1] += tree.depths
        self.ends[-1] += [self.used + end for end in tree.ends]
        self.used += len(tree)

    def filled(self) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
        """Of one width: a filling token sees itself alone, so that its attention is a number."""
        for tokens, depths, ends in zip(self.tokens, self.depths, self.ends, strict=True):
            own, rest = len(tokens), self.width - len(tokens)
            tokens += [self.padding] * rest
            depths += [0] * rest
            ends += range(own + 1, self.width + 1)
        return self.tokens, self.depths, self.ends


def _reading(trees: Sequence[TokenTree], starts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Where predictions are read, edges, paths and which answers exist, as TreeBatch has them."""
    places = [start + source for tree, start in zip(trees, starts, strict=True) for source in tree.sources]
    reads, edge_reads = torch.unique(torch.tensor(places), return_inverse=True)
    edge_tokens = torch.tensor([token for tree in trees for token in tree.targets])
    most = max(len(tree.paths) for tree in trees)
    steps = max(len(path) for tree in trees for path in tree.paths)
    paths = torch.full((len(trees), most, steps), len(edge_tokens))
    before = 0
    for number, tree in enumerate(trees):
        for answer, path in enumerate(tree.paths):
            paths[number, answer, : len(path)] = before + torch.tensor(path)
        before += len(tree.targets)
    return reads, edge_reads, edge_tokens, paths, paths[:, :, 0] < len(edge_tokens)
