from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.directions import largest_triplets, smallest_triplets, triplets
from rankwise.directions.triplets import check_part
from rankwise.errors import UserError

SHAPES = {"tall": (12, 7), "wide": (7, 12), "square": (7, 7)}
# The 3 of 7 singular values, descending, that each part takes, in the order in which it returns them.
PICKED = {"minor": [6, 5, 4], "principal": [0, 1, 2], "middle": [2, 3, 4]}


def weight_of(shape: tuple[int, int], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("part", PICKED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_agrees_with_numpy(shape, dtype, part):
    """Singular values agree; vectors agree up to their sign."""
    weight = weight_of(shape, dtype)
    u, s, vh = triplets(weight, 3, part)
    full_u, full_s, full_vh = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    picked = PICKED[part]
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert u.dtype == s.dtype == vh.dtype == expected
    tolerance = 1e-10 if dtype == torch.float64 else 2e-6
    np.testing.assert_allclose(s.numpy(), full_s[picked], rtol=tolerance)
    np.testing.assert_allclose(np.abs((u.double().numpy() * full_u[:, picked]).sum(0)), 1, rtol=tolerance)
    np.testing.assert_allclose(np.abs((vh.double().numpy() * full_vh[picked]).sum(1)), 1, rtol=tolerance)


@pytest.mark.parametrize("part", [*PICKED, "random"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_identities(shape, part):
    """W v = s u, u W = s v, and both sides are orthonormal."""
    weight = weight_of(shape)
    u, s, vh = triplets(weight, 4, part, seed=5)
    torch.testing.assert_close(weight @ vh.T, u * s)
    torch.testing.assert_close(u.T @ weight, s[:, None] * vh)
    torch.testing.assert_close(u.T @ u, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(vh @ vh.T, torch.eye(4, dtype=torch.float64))


def test_smallest_ascend_and_largest_descend_and_together_make_the_weight():
    weight = weight_of((9, 7))
    small, large = smallest_triplets(weight, 3), largest_triplets(weight, 4)
    assert (small.S.diff() > 0).all()
    assert (large.S.diff() < 0).all()
    assert small.S.max() < large.S.min()
    whole = sum((part.U * part.S) @ part.Vh for part in (small, large))
    torch.testing.assert_close(whole, weight)


def test_smallest_directions_survive_a_large_one():
    """Singular values 1e6 to 1e-2: a decomposition in float32 would err by about 1e6 * 6e-8 = 0.06."""
    u, _ = np.linalg.qr(weight_of((8, 8)).numpy())
    v, _ = np.linalg.qr(weight_of((9, 9)).numpy()[:8, :8])
    weight = torch.tensor(u @ np.diag(np.logspace(6, -2, 8)) @ v.T).float()
    expected = np.linalg.svd(weight.double().numpy(), compute_uv=False)[::-1][:2]
    np.testing.assert_allclose(smallest_triplets(weight, 2).S.numpy(), expected, rtol=1e-6)


def test_random_part_is_drawn_by_its_seed_without_repetition():
    weight = weight_of((20, 30))
    every = np.linalg.svd(weight.numpy(), compute_uv=False)
    drawn = {seed: triplets(weight, 6, "random", seed).S for seed in range(4)}
    for seed, s in drawn.items():
        positions = [int(np.abs(every - float(value)).argmin()) for value in s]
        np.testing.assert_allclose(s.numpy(), every[positions], rtol=1e-10)
        assert sorted(set(positions)) == positions
        assert torch.equal(s, triplets(weight, 6, "random", seed).S)
    assert len({tuple(s.tolist()) for s in drawn.values()}) > 1


def test_random_part_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    triplets(weight_of((5, 5)), 2, "random", seed=9)
    assert torch.equal(torch.rand(3), expected)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_every_part_of_any_weight_is_singular(data):
    m, n = data.draw(st.tuples(st.integers(1, 8), st.integers(1, 8)))
    rank = data.draw(st.integers(1, min(m, n)))
    part = data.draw(st.sampled_from(["minor", "principal", "middle", "random"]))
    scale = 10.0 ** data.draw(st.integers(-6, 6))
    seed = data.draw(st.integers(0, 99))
    weight = scale * torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u, s, vh = triplets(weight, rank, part, seed)
    assert u.shape == (m, rank) and s.shape == (rank,) and vh.shape == (rank, n)
    assert (s >= 0).all()
    torch.testing.assert_close(weight @ vh.T, u * s, atol=1e-12 * scale, rtol=1e-9)
    torch.testing.assert_close(u.T @ u, torch.eye(rank, dtype=torch.float64))


def test_a_weight_with_equal_and_zero_singular_values():
    assert torch.equal(smallest_triplets(torch.zeros(4, 3), 2).S, torch.zeros(2))
    torch.testing.assert_close(largest_triplets(torch.eye(4), 4).S, torch.ones(4))


def test_results_carry_no_gradient():
    weight = weight_of((4, 4)).requires_grad_()
    assert not any(part.requires_grad for part in smallest_triplets(weight, 2))


@pytest.mark.parametrize("rank", [0, -1, 8])
def test_rank_out_of_range(rank):
    with pytest.raises(UserError, match=rf"rank {rank} of a weight of shape \(9, 7\)"):
        smallest_triplets(weight_of((9, 7)), rank)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(bad):
    weight = weight_of((3, 3))
    weight[1, 2] = bad
    with pytest.raises(UserError, match="NaN or infinity"):
        largest_triplets(weight, 1)


def test_an_unknown_part_names_the_nearest():
    with pytest.raises(UserError, match=r"'minr'.*did you mean 'minor'"):
        check_part("minr")
    with pytest.raises(UserError, match="known: middle, minor, principal, random"):
        check_part("xyz")
