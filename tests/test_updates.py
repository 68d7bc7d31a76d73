"""Updates against weights, and drift of representations, by hand and against other ways to compute them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rankwise.analysis import intruder_dimensions, linear_cka, projections
from rankwise.errors import UserError


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_projections_by_hand() -> None:
    """W = diag(4, 3, 1), D = 2 e3 e3^T: W has 1 in D's direction, 4 in its own; a random one meets ||W|| / 3."""
    found = projections(torch.diag(torch.tensor([4.0, 3.0, 1.0])), torch.diag(torch.tensor([0.0, 0.0, 2.0])), 1)
    assert found == pytest.approx((1.0, 4.0, 26**0.5 / 3, 2.0))
    assert found.amplification == pytest.approx(2.0)
    none = projections(torch.diag(torch.tensor([4.0, 3.0, 0.0])), torch.diag(torch.tensor([0.0, 0.0, 2.0])), 1)
    assert none.amplification == float("inf")


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_projections_agree_with_numpy(generator: torch.Generator, shape: tuple[int, int]) -> None:
    weight, delta = (torch.randn(*shape, generator=generator) for _ in range(2))
    u, _, v = np.linalg.svd(delta.double().numpy())
    found = projections(weight, delta, 3)
    assert found.of_update == pytest.approx(np.linalg.norm(u[:, :3].T @ weight.double().numpy() @ v[:3].T))
    assert found.of_update <= found.of_weight


def test_random_directions_meet_what_is_expected(generator: torch.Generator) -> None:
    """The root of the mean square over 400 random updates of rank 2."""
    weight = torch.randn(8, 10, generator=generator)
    squares = [projections(weight, torch.randn(8, 10, generator=generator), 2).of_update ** 2 for _ in range(400)]
    found = projections(weight, torch.ones(8, 10), 2)
    assert np.mean(squares) ** 0.5 == pytest.approx(found.of_random, rel=0.05)


def test_intruders_by_hand() -> None:
    """A large update between two axes of W is new; one along an axis is not."""
    weight = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    along = intruder_dimensions(weight, torch.diag(torch.tensor([0.0, 0.0, 5.0])))
    assert (along.places, along.examined) == ([], 3)
    assert along.similarities == pytest.approx([1.0, 1.0, 1.0])
    between = torch.ones(3, 1) / 3**0.5
    found = intruder_dimensions(weight, 100 * between @ between.T, examined=1, least=0.7)
    assert found.places == [0]
    assert found.similarities == pytest.approx([3**-0.5], abs=0.02)
    assert intruder_dimensions(weight, 100 * between @ between.T, examined=1, least=0.5).places == []


def test_a_small_update_brings_no_intruder(generator: torch.Generator) -> None:
    weight = torch.diag(torch.arange(1.0, 21.0))
    delta = 0.01 * torch.randn(20, 1, generator=generator) @ torch.randn(1, 20, generator=generator)
    assert intruder_dimensions(weight, delta).places == []


def test_cka_agrees_with_its_kernel_form(generator: torch.Generator) -> None:
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) of the linear kernels, with the centring matrix."""
    x, y = torch.randn(30, 5, generator=generator), torch.randn(30, 8, generator=generator)
    centre = np.eye(30) - np.ones((30, 30)) / 30
    k, l = (centre @ (side.double() @ side.double().T).numpy() @ centre for side in (x, y))  # noqa: E741
    expected = (k * l).sum() / ((k * k).sum() * (l * l).sum()) ** 0.5
    assert linear_cka(x, y) == pytest.approx(expected)


def test_cka_does_not_see_turns_shifts_and_scales(generator: torch.Generator) -> None:
    x = torch.randn(40, 6, generator=generator)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    assert linear_cka(x, 3 * x @ turn + 7) == pytest.approx(1.0)
    assert linear_cka(torch.eye(4)[:, :1], torch.eye(4)[:, 1:2]) == pytest.approx(1 / 9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: projections(torch.eye(3), torch.zeros(3, 3), 1), "the update is zero or not finite"),
        (lambda: projections(torch.eye(3), torch.eye(3), 4), "rank must be 1..3 for a weight of"),
        (lambda: intruder_dimensions(torch.eye(3), torch.eye(3), 0), "examined 0 and least 0.5 are not possible"),
        (lambda: intruder_dimensions(torch.eye(3), torch.full((3, 3), torch.nan)), "zero or not finite"),
        (lambda: linear_cka(torch.ones(1, 2), torch.ones(1, 2)), "the same two rows or more"),
        (lambda: linear_cka(torch.ones(4, 2), torch.randn(4, 2)), "does not vary over rows"),
    ],
)
def test_what_cannot_be_compared_is_refused(call, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()
