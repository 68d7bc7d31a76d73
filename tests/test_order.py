"""The order of rows that several processes draw: the same in each, another in each pass."""

from __future__ import annotations

from typing import Any

import pytest
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from rankwise.checkpoints.order import OrderOfEpoch, tell_epoch


def test_a_sampler_without_passes_is_left_alone() -> None:
    rows = list(range(8))
    settings = {"num_processes": 2, "process_index": 0, "put_on_device": False}
    made = prepare_data_loader(DataLoader(rows, batch_size=2, sampler=SequentialSampler(rows)), **settings)
    tell_epoch(made, 1)
    assert [batch.tolist() for batch in made] == [[0, 1], [4, 5]]


@pytest.mark.parametrize("seedable", [True, False])
def test_a_pass_that_goes_on_has_its_own_order(seedable: bool) -> None:
    """Batches of two processes that are skipped by accelerate, which does not tell every sampler of the pass."""
    rows = list(range(24))
    sampler = RandomSampler(rows) if seedable else OrderOfEpoch(4, lengths=[1 + row % 5 for row in rows], seed=3)

    def loader() -> Any:
        made = DataLoader(rows, batch_size=2, sampler=sampler)
        settings = {"num_processes": 2, "process_index": 1, "use_seedable_sampler": True, "data_seed": 3}
        return prepare_data_loader(made, put_on_device=False, rng_types=[], **settings)

    passes = loader()
    first, second = ([batch.tolist() for batch in passes] for _ in range(2))
    assert first != second
    again = loader()
    tell_epoch(again, 1)
    left = skip_first_batches(again, 2)
    left.set_epoch(1)  # as the Trainer does
    assert [batch.tolist() for batch in left] == second[2:]
