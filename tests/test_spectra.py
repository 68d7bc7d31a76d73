from __future__ import annotations

import numpy as np
import pytest
import torch

from rankwise.analysis import effective_rank, subspace_overlap, update_overlap
from rankwise.errors import UserError


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_effective_rank_of_equal_values_is_their_number():
    assert effective_rank(torch.full((5,), 0.3)) == pytest.approx(5.0, abs=1e-6)
    assert effective_rank(torch.tensor([2.0, 0.0, 2.0])) == pytest.approx(2.0, abs=1e-6)


def test_effective_rank_by_hand():
    """p = (3/4, 1/4): H = 3/4 ln(4/3) + 1/4 ln 4, and exp H = 4 / 3**0.75."""
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(4 / 3**0.75, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_effective_rank_agrees_with_numpy(generator, dtype):
    values = torch.rand(17, generator=generator).to(dtype)
    shares = values.double().numpy() / values.double().numpy().sum()
    assert effective_rank(values) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-9)


def test_effective_rank_at_the_edges():
    assert effective_rank(torch.zeros(4)) == 0.0
    assert effective_rank(torch.zeros(0)) == 0.0
    assert effective_rank(torch.full((3,), 1e308, dtype=torch.float64)) == pytest.approx(3.0)
    with pytest.raises(UserError, match="not negative"):
        effective_rank(torch.tensor([1.0, -1.0]))
    with pytest.raises(UserError, match="finite"):
        effective_rank(torch.tensor([1.0, float("nan")]))


def test_subspace_overlap_by_hand():
    """Planes xy and yz share one axis of two; a line at 45 degrees to an axis overlaps it by cos^2 = 1/2."""
    axes = torch.eye(3)
    assert subspace_overlap(axes[:, :2], axes[:, 1:]) == pytest.approx(0.5)
    assert subspace_overlap(axes[:, :1], torch.tensor([[3.0], [3.0], [0.0]])) == pytest.approx(0.5)
    assert subspace_overlap(axes[:, :1], axes[:, :2]) == pytest.approx(1.0)
    assert subspace_overlap(axes[:, :1], axes[:, 2:]) == pytest.approx(0.0, abs=1e-12)


def test_subspace_overlap_agrees_with_numpy(generator):
    first, second = torch.randn(20, 3, generator=generator), torch.randn(20, 5, generator=generator)
    one, two = np.linalg.qr(first.double().numpy())[0], np.linalg.qr(second.double().numpy())[0]
    expected = np.linalg.norm(one.T @ two) ** 2 / 3
    assert 0.02 < expected < 0.98
    assert subspace_overlap(first, second) == pytest.approx(expected, rel=1e-9)
    assert subspace_overlap(second, first) == pytest.approx(expected, rel=1e-9)


def test_subspace_overlap_does_not_depend_on_the_basis(generator):
    first, second = torch.randn(12, 4, generator=generator), torch.randn(12, 4, generator=generator)
    mixed = first @ torch.randn(4, 4, generator=generator)
    assert subspace_overlap(mixed, second) == pytest.approx(subspace_overlap(first, second), rel=1e-4)


def test_dependent_columns_add_no_direction(generator):
    first, second = torch.randn(12, 2, generator=generator), torch.randn(12, 4, generator=generator)
    padded = torch.cat([first, first[:, :1] * 3, torch.zeros(12, 1)], dim=1)
    assert subspace_overlap(padded, second) == pytest.approx(subspace_overlap(first, second), rel=1e-5)
    with pytest.raises(UserError, match="non-zero column"):
        subspace_overlap(torch.zeros(12, 2), second)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)])
def test_update_overlap_agrees_with_numpy(generator, shape):
    weight = torch.randn(*shape, generator=generator)
    delta = torch.randn(shape[0], 2, generator=generator) @ torch.randn(2, shape[1], generator=generator)
    left, _, right = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    update = delta.double().numpy()
    energy = np.linalg.norm(update) ** 2
    found = update_overlap(weight, delta, 3)
    assert found.top == pytest.approx(np.linalg.norm(left[:, :3].T @ update @ right[:3].T) ** 2 / energy, rel=1e-9)
    assert found.bottom == pytest.approx(np.linalg.norm(left[:, -3:].T @ update @ right[-3:].T) ** 2 / energy, rel=1e-9)
    assert found.chance == pytest.approx(9 / (shape[0] * shape[1]))


def test_update_overlap_by_hand():
    """W = diag(3, 2, 1); D has 4 of its 5 units of energy on the first direction, 1 on the last."""
    found = update_overlap(torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.diag(torch.tensor([2.0, 0.0, 1.0])), 1)
    assert (found.top, found.bottom, found.chance) == pytest.approx((0.8, 0.2, 1 / 9))


def test_random_updates_have_the_chance_share(generator):
    weight = torch.randn(24, 16, generator=generator)
    found = [update_overlap(weight, torch.randn(24, 16, generator=generator), 4) for _ in range(100)]
    assert np.mean([one.top for one in found]) == pytest.approx(found[0].chance, rel=0.15)


def test_update_overlap_refuses_bad_input():
    weight = torch.eye(4)
    for rank in (0, 5):
        with pytest.raises(UserError, match=rf"rank must be 1\.\.4 .* got {rank}"):
            update_overlap(weight, weight, rank)
    with pytest.raises(UserError, match="update is zero"):
        update_overlap(weight, torch.zeros(4, 4), 1)
