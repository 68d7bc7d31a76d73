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
        rank: how many leading directions must converge.
        tolerance: residual of a converged direction, relative to its singular value.
        most: steps to take at most; ``most * block`` is at most ``rows`` and ``columns``.

    Source: Golub, Luk and Overton, A block Lanczos method for computing the singular values and corresponding singular
    vectors of a matrix (ACM Transactions on Mathematical Software 7, 1981).
    """
    block = start.shape[1]
    right, left = start, start[:, :0]
    projected = start.new_zeros(block * most, block * most)
    for step in range(most):
        done, size = step * block, (step + 1) * block
        image = linear.apply(right[:, done:])
        new, above, projected[done:size, done:size] = _outside(image, left if step else image[:, :0])
        projected[:done, done:size] = above
        left = torch.cat([left, new], dim=1) if step else new
        if size + block > most * block:
            break
        following, _, coupling = _outside(linear.apply_transposed(new), right)
        if step > 1:
            dominant, residual = _dominant(projected[:size, :size], coupling, rank)
            if residual <= tolerance:
                return left @ dominant[:, :block]
        right = torch.cat([right, following], dim=1)
    last: Tensor = left @ torch.linalg.svd(projected[:size, :size])[0][:, :block]
    return last


def _outside(
    x: Float[Tensor, "n block"], basis: Float[Tensor, "n done"]
) -> tuple[Float[Tensor, "n block"], Float[Tensor, "done block"], Float[Tensor, "block block"]]:
    """Write x as ``basis @ inside + new @ r`` with ``new`` orthonormal and outside the basis."""
    first = basis.T @ x
    x = x - basis @ first
    second = basis.T @ x
    new, r = torch.linalg.qr(x - basis @ second)
    return new, first + second, r


def _dominant(
    projected: Float[Tensor, "size size"], coupling: Float[Tensor, "block block"], rank: int
) -> tuple[Float[Tensor, "size size"], float]:
    """Left singular vectors of the projected map, and the largest relative residual of the first ``rank``."""
    u, s, _ = torch.linalg.svd(projected)
    residual = torch.linalg.vector_norm(coupling @ u[-coupling.shape[0] :, :rank], dim=0)
    return u, float((residual / s[:rank]).max())
