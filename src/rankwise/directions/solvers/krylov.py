"""Block Golub-Kahan bidiagonalisation: the dominant singular directions of a map that is known by its products."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

# After one Cholesky factorisation the product of a block with itself is as close as this to 1, or reflections are used.
ORTHONORMAL = 0.1

Product = Callable[[Tensor], Tensor]


class Map(NamedTuple):
    """A linear map of columns, and its transpose."""

    apply: Product
    apply_transposed: Product


def dominant_subspace(
    linear: Map, start: Float[Tensor, "columns block"], rank: int, tolerance: float, most: int
) -> tuple[Float[Tensor, "rows block"], Float[Tensor, " block"]]:
    """The map's ``block`` most dominant left singular vectors, nearly orthonormal, with their values, descending.

    Golub-Kahan rather than Lanczos on ``A A^T``: the projected matrix holds singular values, not their squares, so that
    float32 still resolves the last of the wanted directions beside the first. Every block is orthogonalised twice
    against all before it.

    Args:
        linear: A, from ``columns`` to ``rows``.
        start: an orthonormal block, at least ``rank`` wide, so that no copy of a repeated singular value is missed.
        rank: how many leading singular values must converge.
        tolerance: relative change of a value in a step, below which it counts as converged. An error e of a direction
            is one of e^2 in its value, and a step makes both much smaller.
        most: steps to take at most; ``most * block`` is at most ``rows`` and ``columns``.

    Source: Golub, Luk and Overton, A block Lanczos method for computing the singular values and corresponding singular
    vectors of a matrix (ACM Transactions on Mathematical Software 7, 1981).
    """
    block = start.shape[1]
    right, left = start, start[:, :0]
    projected = start.new_zeros(block * most, block * most)
    before = None
    for step in range(most):
        done, size = step * block, (step + 1) * block
        image = linear.apply(right[:, done:])
        new, above, projected[done:size, done:size] = _outside(image, left if step else image[:, :0])
        projected[:done, done:size] = above
        left = torch.cat([left, new], dim=1) if step else new
        inner, values, _ = torch.linalg.svd(projected[:size, :size])
        wanted = values[:rank]
        if before is not None and bool((wanted - before <= tolerance * wanted).all()):
            break
        before = wanted
        if step + 1 < most:
            right = torch.cat([right, _outside(linear.apply_transposed(new), right)[0]], dim=1)
    return left @ inner[:, :block], values[:block]


def orthonormal(x: Float[Tensor, "n k"]) -> tuple[Float[Tensor, "n k"], Float[Tensor, "k k"]]:
    """Q and R: by two Cholesky factorisations, which are products nearly all, or by Householder's reflections.

    Source: Yamamoto, Nakatsukasa, Yanagisawa and Fukaya, Roundoff error analysis of the CholeskyQR2 algorithm
    (Electronic Transactions on Numerical Analysis 44, 2015).
    """
    q, r = x, torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    one = r
    for _ in range(2):
        lower, failed = torch.linalg.cholesky_ex(q.T @ q)
        q = torch.linalg.solve_triangular(lower.T, q, upper=True, left=False)
        r = lower.T @ r
    settled = not failed and bool(((lower - one).abs() < ORTHONORMAL).all())
    return (q, r) if settled else torch.linalg.qr(x)


def _outside(
    x: Float[Tensor, "n block"], basis: Float[Tensor, "n done"]
) -> tuple[Float[Tensor, "n block"], Float[Tensor, "done block"], Float[Tensor, "block block"]]:
    """Write x as ``basis @ inside + new @ r`` with ``new`` orthonormal and outside the basis."""
    first = basis.T @ x
    x = x - basis @ first
    second = basis.T @ x
    new, r = orthonormal(x - basis @ second)
    return new, first + second, r
