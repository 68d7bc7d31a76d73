"""The order of batches by length that several processes draw alike, and again where a training goes on."""

from __future__ import annotations

from typing import Any

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class OrderOfEpoch(LengthGroupedSampler):
    """Batches of rows of about the same length, in an order that follows from a seed and the number of the epoch.

    Args:
        batch: rows of a step, of all processes.
        lengths: of the rows.
        seed: of the order.
    """

    def __init__(self, batch: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch, lengths=lengths)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Told by the dataloader, before it begins."""
        self.generator = torch.Generator().manual_seed(self.seed + epoch)


def tell_epoch(loader: Any, epoch: int) -> None:
    """Tell the sampler which pass begins; accelerate's shares of batches, where some are skipped, do not pass it on."""
    batches = loader.batch_sampler
    while batches is not None and not hasattr(batches, "sampler"):
        batches = getattr(batches, "batch_sampler", None)
    if isinstance(sampler := getattr(batches, "sampler", None), OrderOfEpoch):
        sampler.set_epoch(epoch)
