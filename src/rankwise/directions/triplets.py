"""Singular triplets of a weight: the smallest, the largest, the middle, or random ones."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.directions.solvers import Solver, decompose
from rankwise.errors import UserError, nearest

Part = Literal["minor", "principal", "middle", "random"]


class Triplets(NamedTuple):
    """Singular triplets: ``weight @ Vh[i] == S[i] * U[:, i]`` and ``weight.T @ U[:, i] == S[i] * Vh[i]``."""

    U: Float[Tensor, "m rank"]
    S: Float[Tensor, " rank"]
    Vh: Float[Tensor, "rank n"]


def smallest_triplets(weight: Float[Tensor, "m n"], rank: int) -> Triplets:
    """The ``rank`` smallest singular triplets of ``weight``, ascending; otherwise as :func:`triplets`.

    Source: MiLoRA (arXiv 2406.09044), section 3.
    """
    return triplets(weight, rank, "minor")


def largest_triplets(weight: Float[Tensor, "m n"], rank: int) -> Triplets:
    """The ``rank`` largest singular triplets of ``weight``, descending; otherwise as :func:`triplets`.

    Source: PiSSA (arXiv 2404.02948), section 3.
    """
    return triplets(weight, rank, "principal")


def triplets(weight: Float[Tensor, "m n"], rank: int, part: Part, seed: int = 0, solver: Solver = "auto") -> Triplets:
    """The ``rank`` singular triplets of ``weight`` in one part of its spectrum.

    Args:
        weight: a matrix of any real dtype, finite. Half precision is decomposed as float32.
        rank: 1 to min(m, n).
        part: ``minor`` (smallest, ascending), ``principal`` (largest, descending), ``middle`` (the ``rank`` around the
            median, descending) or ``random`` (drawn without repetition by ``seed``, descending).
        seed: of the draw for ``random``.
        solver: ``auto`` takes a method that looks at one end alone, for few triplets at that end of a large spectrum.
            It measures the leak (the sine between the vectors found and the wanted subspace, root mean square over the
            vectors, on the worse of both sides) and falls back to the dense decomposition in float64, with a line in
            the log, where that is more than 1e-3, or 1e-7 for a float64 weight. ``dense`` is always the latter.

    Returns:
        U (m, rank), S (rank,), Vh (rank, n) on the weight's device, in float32, or float64 for a float64 weight. U and
        V are orthonormal to that type's rounding; ``W V = U S`` and ``W^T U = V S`` to the leak, and where the
        weight is not square the one of its longer side to rounding.

    Raises:
        UserError: an unknown part or solver, a rank out of range, a weight that is no finite matrix of real numbers, or
            one so large that its singular values are not finite in the type of the result.
    """
    check_part(part)
    if solver not in get_args(Solver):
        raise UserError(f"solver {solver!r} is unknown: {nearest(solver, get_args(Solver))}")
    check_weight(weight, rank)
    picked = _positions(min(weight.shape), rank, part, seed)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        found = decompose(_wide(weight).contiguous(), picked, solver)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if not torch.isfinite(found.S.to(dtype)).all():
        raise UserError(f"singular values up to {float(found.S.max()):.1e} do not fit into {dtype}: scale the weight")
    return Triplets(found.U.to(dtype), found.S.to(dtype), found.V.T.to(dtype).contiguous())


def check_weight(weight: Tensor, rank: int) -> None:
    """Raise a ``UserError`` for a weight that has no triplets of this rank: no finite matrix, or too small a one."""
    if weight.ndim != 2 or not 1 <= rank <= min(weight.shape):
        raise UserError(f"rank {rank} of a weight of shape {tuple(weight.shape)}: 1 to its smaller side is possible")
    if weight.is_meta:
        raise UserError(
            f"a weight of shape {tuple(weight.shape)} is on the meta device and has no values: load it first"
        )
    if not weight.is_floating_point() or weight.layout != torch.strided:
        raise UserError(f"a weight of {weight.dtype} ({weight.layout}) has no triplets here: give dense real numbers")
    if not all(math.isfinite(float(end)) for end in torch.aminmax(_wide(weight.detach()))):
        raise UserError(f"a weight of shape {tuple(weight.shape)} holds NaN or infinity: it has no singular values")


def _wide(weight: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """Eight-bit floats, which torch cannot compare, as float32; others as they are."""
    return weight.float() if weight.element_size() == 1 else weight


def check_part(part: str) -> None:
    """Raise a ``UserError`` for an unknown part of the spectrum."""
    if part not in get_args(Part):
        raise UserError(f"part {part!r} of the spectrum is unknown: {nearest(part, get_args(Part))}")


def _positions(count: int, rank: int, part: Part, seed: int) -> list[int]:
    """Positions in the descending spectrum, in the order in which they are returned."""
    if part == "minor":
        return list(range(count - 1, count - 1 - rank, -1))
    if part == "principal":
        return list(range(rank))
    if part == "middle":
        first = (count - rank) // 2
        return list(range(first, first + rank))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[:rank].sort().values.tolist()
