"""Keys and values of a search: of the prompts, and of the nodes of the trie that others go on from."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

Layer = tuple[Float[Tensor, "rows heads _length width"], Float[Tensor, "rows heads _length width"]]


class Memory:
    """What is kept of every layer, a row for each prompt; nodes have slots, in the order in which they were kept."""

    def __init__(self, prompts: DynamicCache) -> None:
        self.prompts: list[Layer] = [(layer.keys, layer.values) for layer in prompts.layers]
        self.nodes: list[Layer] = [(keys[:, :, :0], values[:, :, :0]) for keys, values in self.prompts]

    @property
    def slots(self) -> int:
        """How many nodes are kept, in the longest row."""
        return self.nodes[0][0].shape[2]

    def select(self, rows: Int[Tensor, " left"]) -> None:
        """Keep these rows only."""
        self.prompts = [(keys[rows], values[rows]) for keys, values in self.prompts]
        self.nodes = [(keys[rows], values[rows]) for keys, values in self.nodes]

    def recall(self, slots: Int[Tensor, "rows recalled"]) -> DynamicCache:
        """A cache of the prompts, and after them of the nodes in some slots of each row."""
        cache = DynamicCache()
        for index, (prompt, nodes) in enumerate(zip(self.prompts, self.nodes, strict=True)):
            keys, values = (
                torch.cat([old, _picked(kept, slots)], dim=2) for old, kept in zip(prompt, nodes, strict=True)
            )
            cache.update(keys, values, index)
        return cache

    def keep(self, cache: DynamicCache, columns: Int[Tensor, "rows kept"]) -> None:
        """Give the next slots to some columns of a cache."""
        for index, (layer, nodes) in enumerate(zip(cache.layers, self.nodes, strict=True)):
            new = (_picked(layer.keys, columns), _picked(layer.values, columns))
            keys, values = (torch.cat(pair, dim=2) for pair in zip(nodes, new, strict=True))
            self.nodes[index] = (keys, values)


def _picked(kept: Tensor, places: Tensor) -> Tensor:
    index = places[:, None, :, None].expand(-1, kept.shape[1], -1, kept.shape[3])
    return kept.gather(2, index)
