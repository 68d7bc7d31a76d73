"""The smallest triplets of a square weight, by its LU factors: both sides, and how far they may be off."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.directions.solvers.edges import Edge, searched
from rankwise.directions.solvers.inverses import Inverse, lu_inverse
from rankwise.directions.solvers.krylov import orthonormal
from rankwise.directions.solvers.products import product_and_transposed

# As in the other methods, but the first pass does what one or two more steps would.
SETTLED = 1e4
# Passes of measuring and subtracting the error, the later ones where as many times the tolerance is left.
PASSES = 3
NEARLY = 10
# Random mixtures of the left vectors, on which the rounding of the factorisation is measured.
PROBES = 32
# Squared values closer than this many roundings of the iteration's type, relative, cannot be told apart.
TOLD_APART = 64


class Beyond(NamedTuple):
    """The directions next to the wanted ones: orthonormal right vectors, and their squared values, ascending."""

    V: Float[Tensor, "n extra"]
    values: Float[Tensor, " extra"]


class Errors(NamedTuple):
    """What is known of the errors of right vectors.

    Attributes:
        off: what to subtract from each.
        near: how long its part towards the directions next to the wanted ones is.
        far: how long the rest is, at most.
        share: of that rest, what subtracting leaves at most: ``(s / t)^2``, with the last value t that is known.
    """

    off: Float[Tensor, "n rank"]
    near: Float[Tensor, " rank"]
    far: Float[Tensor, " rank"]
    share: Float[Tensor, " rank"]


def by_lu(weight: Float[Tensor, "n n"], rank: int, dtype: torch.dtype, tolerance: float) -> Edge:
    """The ``rank`` smallest triplets: Krylov steps with the LU factors of the weight in ``dtype``, then a check.

    The left vectors are made from the right ones by the factors, as ``W^-T V``: an error e of v towards a value t
    further out is one of ``e s / t`` in u, where in ``W V`` it would be ``e t / s``. What the rounding of the factors
    does to them is seen in the residual ``W^T u - s v``. Products with W are in float64.
    """
    inverse = lu_inverse(weight.to(dtype))
    n = len(weight)
    vectors, values = searched(inverse.map, n, n, rank, dtype, SETTLED * tolerance**2, weight.device)
    vectors = orthonormal(vectors.double())[0]
    beyond = Beyond(vectors[:, rank:], values[rank:].double().square().reciprocal())
    v = vectors[:, :rank]
    for _ in range(PASSES):
        u = orthonormal(inverse.map.apply_transposed(v.to(dtype)).double())[0]
        u, s, v, wv, rounding = pairs(weight, u, v, inverse)
        errors = _errors(inverse.map.apply((wv - u * s).to(dtype)).double(), s, v, beyond, torch.finfo(dtype).eps)
        v = orthonormal(v - errors.off)[0]
        left, right = (torch.hypot(errors.far * share, errors.near) for share in (errors.share.sqrt(), errors.share))
        leak = max(_root_mean_square(left) + rounding, _root_mean_square(right))
        if rounding > tolerance or not tolerance < leak < NEARLY * tolerance:
            break
    return Edge(u, s, v, leak)


def pairs(
    weight: Float[Tensor, "n n"], u: Float[Tensor, "n rank"], v: Float[Tensor, "n rank"], inverse: Inverse
) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Singular pairs U, S, V within two spans, descending; W V; and the error of the left span, root mean square.

    That error, ``W^-T (W^T u - s v)``, is measured on random mixtures of the vectors. Of a few vectors it is measured
    on each, and subtracted from U.
    """
    rank = u.shape[1]
    generator = torch.Generator().manual_seed(1)
    few = rank <= PROBES
    mix = torch.eye(rank) if few else torch.randn(rank, PROBES, generator=generator) / PROBES**0.5
    mix = mix.to(u)
    wv, mixed = product_and_transposed(weight, v, u @ mix)
    off = inverse.map.apply_transposed((mixed - v @ (wv.T @ (u @ mix))).to(inverse.dtype)).double()
    off -= u @ (u.T @ off)
    if few:
        u = orthonormal(u - off)[0]
    turn_u, s, turn_v = torch.linalg.svd(u.T @ wv)
    return u @ turn_u, s, v @ turn_v.T, wv @ turn_v.T, float(torch.linalg.matrix_norm(off)) / rank**0.5


def _errors(
    found: Float[Tensor, "n rank"], s: Float[Tensor, " rank"], v: Float[Tensor, "n rank"], beyond: Beyond, eps: float
) -> Errors:
    """Errors e of right vectors from ``W^-1 (W v - s u)``: its part towards a value t is ``e (1 - s^2 / t^2)``.

    Towards the directions next to the wanted ones t is known. All others lie further out than the last of these: their
    part may be as much larger as if it were there.
    """
    found = found - v @ (v.T @ found)
    near = beyond.V.T @ found
    found = found - beyond.V @ near
    share = s.square() / beyond.values[:, None]
    room = torch.where((1 - share).abs() > TOLD_APART * eps, 1 - share, 0)
    near = near / room
    far = torch.linalg.vector_norm(found, dim=0) / room[-1]
    return Errors(found + beyond.V @ near, torch.linalg.vector_norm(near, dim=0), far, share[-1])


def _root_mean_square(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
