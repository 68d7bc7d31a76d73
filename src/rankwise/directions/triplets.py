"""Singular triplets of a weight: the smallest, the largest, the middle, or random ones."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.errors import UserError, nearest

Part = Literal["minor", "principal", "middle", "random"]


class Triplets(NamedTuple):
    """Singular triplets: ``weight @ Vh[i] == S[i] * U[:, i]``."""

    U: Float[Tensor, "m rank"]
    S: Float[Tensor, " rank"]
    Vh: Float[Tensor, "rank n"]


def smallest_triplets(weight: Float[Tensor, "m n"], rank: int) -> Triplets:
    """The ``rank`` smallest singular triplets of ``weight``, ascending.

    Decomposed densely in float64, since in float32 the smallest directions of a weight are lost in the rounding of its
    largest; returned in float32 (float64 for a float64 weight) on the weight's device.

    Args:
        weight: a matrix of any real dtype, finite.
        rank: 1 to min(m, n).

    Returns:
        U (m, rank), S (rank,) ascending, Vh (rank, n).

    Raises:
        UserError: the rank is out of range, or the weight is no finite matrix.

    Source: MiLoRA (arXiv 2406.09044), section 3.
    """
    return triplets(weight, rank, "minor")


def largest_triplets(weight: Float[Tensor, "m n"], rank: int) -> Triplets:
    """The ``rank`` largest singular triplets of ``weight``, descending; otherwise as :func:`smallest_triplets`.

    Source: PiSSA (arXiv 2404.02948), section 3.
    """
    return triplets(weight, rank, "principal")


def triplets(weight: Float[Tensor, "m n"], rank: int, part: Part, seed: int = 0) -> Triplets:
    """The ``rank`` singular triplets of ``weight`` in one part of its spectrum.

    Args:
        weight: a matrix of any real dtype, finite.
        rank: 1 to min(m, n).
        part: ``minor`` (smallest, ascending), ``principal`` (largest, descending), ``middle`` (the ``rank`` around the
            median, descending) or ``random`` (drawn without repetition by ``seed``, descending).
        seed: of the draw for ``random``.

    Raises:
        UserError: an unknown part, a rank out of range, or a weight that is no finite matrix.
    """
    check_part(part)
    if weight.ndim != 2 or not 1 <= rank <= min(weight.shape):
        raise UserError(f"rank {rank} of a weight of shape {tuple(weight.shape)}: 1 to its smaller side is possible")
    if not torch.isfinite(weight).all():
        raise UserError(f"a weight of shape {tuple(weight.shape)} holds NaN or infinity: it has no singular values")
    u, s, vh = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    picked = _positions(len(s), rank, part, seed).to(s.device)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return Triplets(u[:, picked].to(dtype), s[picked].to(dtype), vh[picked].to(dtype))


def check_part(part: str) -> None:
    """Raise a ``UserError`` for an unknown part of the spectrum."""
    if part not in get_args(Part):
        raise UserError(f"part {part!r} of the spectrum is unknown: {nearest(part, get_args(Part))}")


def _positions(count: int, rank: int, part: Part, seed: int) -> Tensor:
    """Positions in the descending spectrum, in the order in which they are returned."""
    if part == "minor":
        return torch.arange(count - 1, count - 1 - rank, -1)
    if part == "principal":
        return torch.arange(rank)
    if part == "middle":
        first = (count - rank) // 2
        return torch.arange(first, first + rank)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[:rank].sort().values
