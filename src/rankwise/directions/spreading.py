"""Starts of weights that are spread over processes: each process computes its share of them, and all get them all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, distributed

from rankwise.directions.start import Start
from rankwise.directions.variants import READY, compute_start
from rankwise.errors import naming
from rankwise.peft_bridge.matrices import factor_matrices
from rankwise.processes import is_spread, whole, world_size

Named = tuple[str, LoraLayer]


@contextmanager
def starts_together(layers: Sequence[Named], adapter: str, config: LoraConfig) -> Iterator[None]:
    """While the block runs, layers whose weights are spread know their starts; all processes run it on all layers.

    Of as many layers as there are processes, the weights are fetched one after another, and each process keeps and
    decomposes one: no process ever holds more than two whole weights. What it found is then sent to the others, so that
    all have it to the bit.
    """
    spread = [one for one in layers if is_spread(getattr(one[1].get_base_layer(), "weight", None))]
    if config.init_lora_weights is False:
        spread = []
    for name, layer in spread:  # before any of them waits for the others
        with naming(name):
            layer.lora_variant[adapter].check(layer, adapter, config)
    try:
        for first in range(0, len(spread), world_size()):
            _start(spread[first : first + world_size()], adapter, config)
        yield
    finally:
        for _, layer in spread:
            layer.__dict__.pop(READY, None)


def _start(layers: Sequence[Named], adapter: str, config: LoraConfig) -> None:
    """The starts of one layer for each process."""
    own, mine = distributed.get_rank(), None
    for owner, (_, layer) in enumerate(layers):
        weight = whole(layer.get_base_layer().weight)
        mine = weight if owner == own else mine
        del weight
    found = None
    if mine is not None:
        name, layer = layers[own]
        with naming(name):
            found = compute_start(layer, adapter, config, mine)
    for owner, (_, layer) in enumerate(layers):
        layer.__dict__[READY] = _sent(found if owner == own else None, owner, layer, adapter)


def _sent(found: Start | None, owner: int, layer: LoraLayer, adapter: str) -> Start:
    """A start, as its owner found it."""
    b, a = factor_matrices(layer, adapter)
    parts: list[Tensor] = [torch.empty_like(b), torch.empty_like(a), torch.zeros(1, dtype=torch.int64, device=a.device)]
    if found is not None:
        for part, value in zip(parts, (found.B, found.A, torch.tensor([found.zero])), strict=True):
            part.copy_(value)
    for part in parts:
        distributed.broadcast(part, owner)
    return Start(parts[0], parts[1], int(parts[2]))
