"""Singular triplets at one end of a spectrum, without a full decomposition, and how far they may be off."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.directions.solvers.inverses import Inverse
from rankwise.directions.solvers.krylov import Map, dominant_subspace, orthonormal
from rankwise.directions.solvers.products import gram_product, transposed_product

STEPS = 14
CORRECTIONS = 4

# A value that moved by less than this, relative and in squared tolerances, in a step needs no other one.
SETTLED = 3

# Values closer than this, relative and squared, count as one; room below this is rounding.
TIED = {torch.float32: 1e-7, torch.float64: 1e-12}
LEAST_ROOM = 1e-14


class Edge(NamedTuple):
    """Singular triplets at an end of the spectrum, in float64, descending.

    Attributes:
        U: (m, rank) orthonormal.
        S: (rank,).
        V: (n, rank) orthonormal.
        leak: sine between the vectors found and the wanted subspace, root mean square over the vectors, of U or of V,
            whichever is more; an estimate: where it is above 1e-6 never seen to be less than seven tenths of it.
    """

    U: Float[Tensor, "m rank"]
    S: Float[Tensor, " rank"]
    V: Float[Tensor, "n rank"]
    leak: float


class Ritz(NamedTuple):
    """Approximate right singular vectors of W with their products, and eigenvalues of G = W^T W; in float64."""

    V: Float[Tensor, "n block"]
    WV: Float[Tensor, "m block"]
    GV: Float[Tensor, "n block"]
    values: Float[Tensor, " block"]


def by_inverse(weight: Float[Tensor, "m n"], rank: int, inverse: Inverse, tolerance: float) -> Edge:
    """The ``rank`` triplets at the end where the shift is, by the dominant subspace of an inverse.

    The error of a vector v with value t is ``(G - shift)^-1 (G v - t v)``, up to a factor that the first value outside
    bounds. It is computed from a residual in float64, so that the rounding of the factorisation shows in it; it is
    both the measure of the leak and the correction.
    """

    def error(ritz: Ritz) -> tuple[Tensor, Tensor]:
        residual = inverse.sign * (ritz.GV - ritz.V * ritz.values)
        found = inverse.map.apply(inverse.map.apply_transposed(residual.to(inverse.dtype))).double()
        room = (ritz.values[-1] - ritz.values) / (ritz.values[-1] - inverse.shift)
        return found, room

    def left_error(residual: Tensor, _: Tensor) -> Tensor:
        return inverse.map.apply_transposed(residual.to(inverse.dtype)).double()

    smallest = inverse.sign > 0
    ritz, off, leak = _edge(weight, rank, inverse.map, weight.shape[1], inverse.dtype, error, tolerance, smallest)
    return _finished(weight, ritz, off, leak, left_error)


def by_products(weight: Float[Tensor, "m n"], rank: int, tolerance: float) -> Edge:
    """The ``rank`` largest, by products alone; the error of v is ``-(G v - t v) / t``, a step of power iteration."""

    def error(ritz: Ritz) -> tuple[Tensor, Tensor]:
        return ritz.V - ritz.GV / ritz.values, 1 - ritz.values[-1] / ritz.values

    linear = Map(lambda x: weight.T @ x, lambda x: weight @ x)
    ritz, off, leak = _edge(weight, rank, linear, weight.shape[0], weight.dtype, error, tolerance, smallest=False)
    return _finished(weight, ritz, off, leak, lambda residual, values: residual / values)


def block_of(rank: int) -> int:
    """Vectors that are iterated for ``rank`` wanted ones."""
    return rank + max(16, rank // 4)


def searched(
    linear: Map, size: int, side: int, rank: int, dtype: torch.dtype, settled: float, device: torch.device
) -> tuple[Float[Tensor, "n block"], Float[Tensor, " block"]]:
    """Krylov steps from a random block of ``size`` rows, until one moves no wanted value by more than ``settled``."""
    block = block_of(rank)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(size, block, generator=generator, dtype=dtype).to(device)
    return dominant_subspace(linear, orthonormal(start)[0], rank, settled, min(STEPS, side // block))


def _edge(
    weight: Float[Tensor, "m n"],
    rank: int,
    linear: Map,
    size: int,
    dtype: torch.dtype,
    error: Callable[[Ritz], tuple[Tensor, Tensor]],
    tolerance: float,
    smallest: bool,
) -> tuple[Ritz, Float[Tensor, "n rank"], float]:
    """Iterate in ``dtype``; then measure, and correct, in float64: the vectors, their last errors and their leak."""
    block = block_of(rank)
    found, _ = searched(linear, size, weight.shape[1], rank, dtype, SETTLED * tolerance**2, weight.device)
    v = orthonormal(found.double())[0]
    ritz = _ritz(v, *gram_product(weight, v), block, smallest)
    for correction in range(CORRECTIONS + 1):
        off, room = error(ritz)
        off -= ritz.V @ (ritz.V.T @ off)
        leak = _leak(ritz, off, room, rank, TIED[weight.dtype])
        if leak <= tolerance or correction == CORRECTIONS:
            break
        more = torch.linalg.qr(off)[0]
        more = torch.linalg.qr(more - ritz.V @ (ritz.V.T @ more))[0]
        pairs = zip(ritz[:3], (more, *gram_product(weight, more)), strict=True)
        v, wv, gv = (torch.cat(pair, dim=1) for pair in pairs)
        ritz = _ritz(v, wv, gv, block, smallest)
    return ritz, off[:, :rank], leak


def _ritz(
    v: Float[Tensor, "n k"], wv: Float[Tensor, "m k"], gv: Float[Tensor, "n k"], block: int, smallest: bool
) -> Ritz:
    """The ``block`` outermost singular directions within the span of v; not by squares, which blur small values."""
    _, s, turn = torch.linalg.svd(torch.linalg.qr(wv, mode="r").R)
    chosen = slice(-1, -block - 1, -1) if smallest else slice(None, block)
    positions = torch.arange(len(s), device=v.device).tolist()[chosen]
    c = turn.T[:, positions]
    return Ritz(v @ c, wv @ c, gv @ c, s[positions].square())


def _leak(ritz: Ritz, off: Float[Tensor, "n block"], room: Float[Tensor, " block"], rank: int, tied: float) -> float:
    """How far the first ``rank`` right vectors lie outside the wanted subspace.

    Two parts: towards what no vector of the block holds (``|off| / room``), and towards the block's other vectors,
    which the Ritz step separates up to ``r_j^T (G - t_i)^-1 r_i`` over the distance of the values, with residuals r.
    Both factors are bounded in the norm of ``G^-1``, as ``(r^T off) / room``. Values that are equal (up to ``tied``,
    relative) have nothing to separate. Where there is no room the leak is unknown: infinite or NaN.
    """
    room = torch.where(room > LEAST_ROOM, room, 0)
    errors = torch.linalg.vector_norm(off, dim=0) / room
    energies = ((ritz.GV - ritz.V * ritz.values) * off).sum(dim=0).abs().sqrt()
    distance = (ritz.values[rank:, None] - ritz.values[None, :rank]).abs()
    apart = distance > tied * ritz.values[rank - 1]
    mixing = torch.where(apart, energies[rank:, None] * (energies / room)[None, :rank] / distance, 0.0)
    total = errors[:rank].square() + mixing.square().sum(dim=0)
    return float(total.mean().sqrt())


def _finished(
    weight: Float[Tensor, "m n"],
    ritz: Ritz,
    off: Float[Tensor, "n rank"],
    leak: float,
    left_error: Callable[[Tensor, Tensor], Tensor],
) -> Edge:
    """Subtract the error that was measured, orthonormalise, and measure the left side too.

    An error e_j of v towards the direction j is one of ``e_j s_j / s_i`` in u: of the smallest triplets the left
    vectors may be wrong where the right ones are not. Their error follows from the residual ``W^T u - s v``.
    """
    rank = off.shape[1]
    v, r = orthonormal(ritz.V[:, :rank] - off)
    wv = ritz.WV[:, :rank] - (weight @ off.to(weight.dtype)).double()
    u, s, v = rotated(v, torch.linalg.solve_triangular(r, wv, upper=True, left=False))
    left = left_error(transposed_product(weight, u) - v * s, s)
    return Edge(u, s, v, max(leak, float(left.square().sum(dim=0).mean().sqrt())))


def rotated(
    v: Float[Tensor, "n rank"], wv: Float[Tensor, "m rank"]
) -> tuple[Float[Tensor, "m rank"], Float[Tensor, " rank"], Float[Tensor, "n rank"]]:
    """U, S and V within the span of orthonormal v: orthonormal, with ``W V = U S``, descending."""
    u, s, x = torch.linalg.svd(wv, full_matrices=False)
    return u, s, v @ x.T
