"""Where the energy of a matrix lies: effective rank, and overlaps between subspaces."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.errors import UserError


@dataclass(frozen=True)
class UpdateOverlap:
    """Shares of an update's energy, each in 0..1.

    Attributes:
        top: share inside the weight's largest singular directions.
        bottom: share inside the weight's smallest singular directions.
        chance: the share that a random update of the same shape is expected to have in either.
    """

    top: float
    bottom: float
    chance: float


def effective_rank(singular_values: Float[Tensor, " rank"]) -> float:
    """Exponential of the entropy of the normalised singular values: exp(-sum p log p), p = s / sum s.

    It is k for k equal values and 1 for a single one. A zero matrix, which has no direction, gives 0.
    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007, section 2.

    Args:
        singular_values: non-negative, in any order; zeros count for nothing.

    Raises:
        UserError: a value is negative or not finite.
    """
    values = singular_values.double()
    if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise UserError(f"singular values must be finite and not negative, got {singular_values.tolist()}")
    positive = values[values > 0]
    if positive.numel() == 0:
        return 0.0
    # Division by the largest first: the sum of values near the type's maximum would overflow.
    scaled = positive / positive.max()
    shares = scaled / scaled.sum()
    return float(torch.exp(torch.special.entr(shares).sum()))


def column_basis(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows rank"]:
    """Orthonormal basis of the column space in float64; dependent and zero columns add no direction."""
    left, values, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    # The tolerance is that of the type the numbers came in, not of float64: rounding is no direction.
    tolerance = max(matrix.shape) * torch.finfo(matrix.dtype).eps
    basis: Tensor = left[:, values > tolerance * values.max()] if values.numel() else left
    return basis


def subspace_overlap(first: Float[Tensor, "n k"], second: Float[Tensor, "n l"]) -> float:
    """Overlap of two column spaces, ||Q1^T Q2||_F^2 / min(k, l): 0 if orthogonal, 1 if nested.

    Source: Hu et al., "LoRA", arXiv 2106.09685, section 7.2, eq. 4. Where columns are linearly dependent,
    k and l are the numbers of independent ones.

    Raises:
        UserError: one of them has no non-zero column.
    """
    basis, other = column_basis(first), column_basis(second)
    smaller = min(basis.shape[1], other.shape[1])
    if smaller == 0:
        raise UserError("the overlap of subspaces needs at least one non-zero column on each side, one side has none")
    return float((basis.T @ other).square().sum() / smaller)


def update_overlap(weight: Float[Tensor, "m n"], delta: Float[Tensor, "m n"], rank: int) -> UpdateOverlap:
    """Share of an update's energy in the weight's ``rank`` largest and ``rank`` smallest singular directions.

    The share is ||U_k^T D V_k||_F^2 / ||D||_F^2, with U_k and V_k the left and right singular vectors of
    those directions; the smallest are counted among the min(m, n) singular values. ``chance`` is
    rank^2 / (m n).

    Args:
        weight: the matrix whose directions are asked about.
        delta: the update, for LoRA ``scaling * B @ A``.
        rank: number of directions, 1..min(m, n).

    Raises:
        UserError: ``rank`` is out of range, or the update is zero.
    """
    smaller = min(weight.shape)
    if not 1 <= rank <= smaller:
        raise UserError(f"rank must be 1..{smaller} for a weight of {tuple(weight.shape)}, got {rank}")
    energy = delta.double().square().sum()
    if energy == 0:
        raise UserError("the update is zero, so its energy lies nowhere: give the delta of a trained adapter")
    left, _, right = torch.linalg.svd(weight.double(), full_matrices=False)
    rotated = (left.T @ delta.double() @ right.T).square()
    top, bottom = rotated[:rank, :rank].sum() / energy, rotated[-rank:, -rank:].sum() / energy
    return UpdateOverlap(float(top), float(bottom), rank**2 / weight.numel())
