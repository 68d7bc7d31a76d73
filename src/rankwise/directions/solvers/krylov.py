"""Block Golub-Kahan bidiagonalisation: the dominant singular directions of a map that is known by its products."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Product = Callable[[Tensor], Tensor]


class Map(NamedTuple):
    """A linear map of columns, and its transpose."""

    apply: Product
    apply_transposed: Product


def dominant_subspace(
    linear: Map, start: Float[Tensor, "columns block"], rank: int, tolerance: float, most: int
) -> Float[Tensor, "rows block"]:
    """Nearly orthonormal: the map's ``block`` most dominant left singular vectors, leading ones first.

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
        values = torch.linalg.svdvals(projected[:size, :size])[:rank]
        if before is not None and bool(((values - before) <= tolerance * values).all()):
            break
        before = values
        if step + 1 < most:
            right = torch.cat([right, _outside(linear.apply_transposed(new), right)[0]], dim=1)
    dominant: Tensor = left @ torch.linalg.svd(projected[:size, :size])[0][:, :block]
    return dominant


def _outside(
    x: Float[Tensor, "n block"], basis: Float[Tensor, "n done"]
) -> tuple[Float[Tensor, "n block"], Float[Tensor, "done block"], Float[Tensor, "block block"]]:
    """Write x as ``basis @ inside + new @ r`` with ``new`` orthonormal and outside the basis."""
    first = basis.T @ x
    x = x - basis @ first
    second = basis.T @ x
    new, r = torch.linalg.qr(x - basis @ second)
    return new, first + second, r
