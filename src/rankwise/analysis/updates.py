"""An update against the weight that it changes: how much it amplifies, and which directions are new."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.errors import UserError


class Projections(NamedTuple):
    """Frobenius norms of W projected on the ``rank`` main directions of three matrices.

    Attributes:
        of_update: on those of the update: ``||U^T W V||`` with its left and right singular vectors.
        of_weight: on W's own: the most that there is.
        of_random: on those of a random matrix, as expected: ``||W|| rank / sqrt(m n)``.
        update: norm of the update itself.
    """

    of_update: float
    of_weight: float
    of_random: float
    update: float

    @property
    def amplification(self) -> float:
        """``||D|| / ||U^T W V||``: what the update multiplies in its directions; inf where W had nothing there."""
        return self.update / self.of_update if self.of_update else float("inf")


@dataclass(frozen=True)
class Intruders:
    """Directions of an updated weight that the weight had not.

    Attributes:
        places: of those directions among the singular vectors of W + D, from 0, the largest first.
        similarities: of each of the ``examined`` largest singular vectors of W + D, the largest cosine with any of W's.
    """

    places: list[int]
    similarities: list[float]

    @property
    def examined(self) -> int:
        """How many singular vectors were looked at."""
        return len(self.similarities)


def projections(weight: Float[Tensor, "m n"], delta: Float[Tensor, "m n"], rank: int) -> Projections:
    """How much of a weight lies in the main directions of its update.

    Source: LoRA (arXiv 2106.09685), section 7.3 and table 7, where the update's directions are found to be amplified
        some twenty times, and W's own main directions not; MiLoRA (arXiv 2406.09044) asks the same of its updates.

    Args:
        weight: W, before training.
        delta: the update D, for LoRA ``scaling * B @ A``.
        rank: number of directions, 1..min(m, n).

    Raises:
        UserError: ``rank`` is out of range, or the update is zero or not finite.
    """
    _check(weight, delta)
    smaller = min(weight.shape)
    if not 1 <= rank <= smaller:
        raise UserError(f"rank must be 1..{smaller} for a weight of {tuple(weight.shape)}, got {rank}")
    base, update = weight.double(), delta.double()
    left, _, right = torch.linalg.svd(update, full_matrices=False)
    inside = torch.linalg.norm(left[:, :rank].T @ base @ right[:rank].T)
    most = torch.linalg.norm(torch.linalg.svdvals(base)[:rank])
    random = torch.linalg.norm(base) * rank / weight.numel() ** 0.5
    return Projections(float(inside), float(most), float(random), float(torch.linalg.norm(update)))


def intruder_dimensions(
    weight: Float[Tensor, "m n"], delta: Float[Tensor, "m n"], examined: int = 10, least: float = 0.5
) -> Intruders:
    """Left singular vectors of W + D, among the ``examined`` largest, that resemble none of W's.

    A vector is an intruder where ``max_j |cos(u_i, u_j)| < least`` over all left singular vectors u_j of W.

    Source: LoRA vs full fine-tuning (arXiv 2410.21228), algorithm 1, which takes 10 vectors and several thresholds.

    Args:
        weight: W, before training.
        delta: the update D.
        examined: how many of the largest vectors of W + D, 1 or more; all where there are fewer.
        least: cosine from which on a vector is not new, above 0, at most 1.

    Raises:
        UserError: a value is out of range, or the update is zero or not finite.
    """
    _check(weight, delta)
    if examined < 1 or not 0 < least <= 1:
        raise UserError(f"examined {examined} and least {least} are not possible: 1 or more, and above 0 up to 1")
    before = torch.linalg.svd(weight.double(), full_matrices=False)[0]
    after = torch.linalg.svd(weight.double() + delta.double(), full_matrices=False)[0][:, :examined]
    similarities = (before.T @ after).abs().amax(dim=0).tolist()
    return Intruders([place for place, value in enumerate(similarities) if value < least], similarities)


def _check(weight: Tensor, delta: Tensor) -> None:
    if weight.shape != delta.shape:
        raise UserError(f"the update of shape {tuple(delta.shape)} is not of the weight, {tuple(weight.shape)}")
    if not bool(torch.isfinite(delta).all()) or not bool(delta.any()):
        raise UserError("the update is zero or not finite: give the delta of a trained adapter")
