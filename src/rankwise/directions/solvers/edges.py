"""Singular triplets at one end of a spectrum, without a full decomposition, and how far they may be off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.directions.solvers.inverses import Inverse
from rankwise.directions.solvers.krylov import Map, dominant_subspace

# Bytes of a weight's rows that are held in float64 at a time: they stay in a processor's cache.
CHUNK = 8 << 20
STEPS = 14
CORRECTIONS = 4
LEFT_CORRECTIONS = 2

# Values closer than this, relative and squared, count as one; room below this is rounding.
TIED = {torch.float32: 1e-7, torch.float64: 1e-12}
LEAST_ROOM = 1e-14


class Edge(NamedTuple):
    """Singular triplets at an end of the spectrum, in float64, the outermost first.

    Attributes:
        U: (m, rank) orthonormal.
        S: (rank,).
        V: (n, rank) orthonormal.
        leak: sine between the vectors found and the wanted subspace, root mean square over the vectors, of U or of V,
            whichever is more; an estimate, mostly above, never seen to be less than two fifths of it.
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
    return _finished(weight, ritz, off, leak, left_error, tolerance if inverse.own else None)


def by_products(weight: Float[Tensor, "m n"], rank: int, tolerance: float) -> Edge:
    """The ``rank`` largest, by products alone; the error of v is ``-(G v - t v) / t``, a step of power iteration."""

    def error(ritz: Ritz) -> tuple[Tensor, Tensor]:
        return ritz.V - ritz.GV / ritz.values, 1 - ritz.values[-1] / ritz.values

    linear = Map(lambda x: weight.T @ x, lambda x: weight @ x)
    ritz, off, leak = _edge(weight, rank, linear, weight.shape[0], weight.dtype, error, tolerance, smallest=False)
    return _finished(weight, ritz, off, leak, lambda residual, values: residual / values, None)


def block_of(rank: int) -> int:
    """Vectors that are iterated for ``rank`` wanted ones."""
    return rank + max(8, rank // 16)


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
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(size, block, generator=generator, dtype=dtype).to(weight.device)
    most = min(STEPS, weight.shape[1] // block)
    settled = 1e3 * tolerance**2
    found = dominant_subspace(linear, torch.linalg.qr(start)[0], rank, settled, most)
    v = torch.linalg.qr(found.double())[0]
    ritz = _ritz(v, *_products(weight, v), block, smallest)
    for correction in range(CORRECTIONS + 1):
        off, room = error(ritz)
        off -= ritz.V @ (ritz.V.T @ off)
        leak = _leak(ritz, off, room, rank, TIED[weight.dtype])
        if leak <= tolerance or correction == CORRECTIONS:
            break
        more = torch.linalg.qr(off)[0]
        more = torch.linalg.qr(more - ritz.V @ (ritz.V.T @ more))[0]
        pairs = zip(ritz[:3], (more, *_products(weight, more)), strict=True)
        v, wv, gv = (torch.cat(pair, dim=1) for pair in pairs)
        ritz = _ritz(v, wv, gv, block, smallest)
    return ritz, off[:, :rank], leak


def _products(
    weight: Float[Tensor, "m n"], v: Float[Tensor, "n k"]
) -> tuple[Float[Tensor, "m k"], Float[Tensor, "n k"]]:
    """W v and W^T W v in one pass over the weight, in the type of v."""
    forward = v.new_empty(weight.shape[0], v.shape[1])
    back = torch.zeros_like(v)
    for first, chunk in _chunks(weight, v.dtype):
        forward[first : first + len(chunk)] = image = chunk @ v
        back.addmm_(chunk.T, image)
    return forward, back


def _ritz(
    v: Float[Tensor, "n k"], wv: Float[Tensor, "m k"], gv: Float[Tensor, "n k"], block: int, smallest: bool
) -> Ritz:
    """The ``block`` outermost singular directions within the span of v."""
    values, c = torch.linalg.eigh(wv.T @ wv)
    chosen = slice(None, block) if smallest else slice(-1, -block - 1, -1)
    positions = torch.arange(len(values), device=v.device).tolist()[chosen]
    c = c[:, positions]
    return Ritz(v @ c, wv @ c, gv @ c, values[positions].clamp(min=0))


def _leak(ritz: Ritz, off: Float[Tensor, "n block"], room: Float[Tensor, " block"], rank: int, tied: float) -> float:
    """How far the first ``rank`` right vectors lie outside the wanted subspace.

    Two parts: towards what no vector of the block holds (``|off| / room``), and towards the block's other vectors,
    which the Ritz step separates up to a product of both sides' errors over their distance. Values that are equal (up
    to ``tied``, relative) have nothing to separate. Where there is no room the leak is unknown: infinite or NaN.
    """
    errors = torch.linalg.vector_norm(off, dim=0) / torch.where(room > LEAST_ROOM, room, 0)
    residuals = torch.linalg.vector_norm(ritz.GV - ritz.V * ritz.values, dim=0)
    distance = (ritz.values[rank:, None] - ritz.values[None, :rank]).abs()
    apart = distance > tied * ritz.values[rank - 1]
    mixing = torch.where(apart, residuals[rank:, None] * errors[None, :rank] / distance, 0.0)
    total = errors[:rank].square() + mixing.square().sum(dim=0)
    return float(total.mean().sqrt())


def _finished(
    weight: Float[Tensor, "m n"],
    ritz: Ritz,
    off: Float[Tensor, "n rank"],
    leak: float,
    left_error: Callable[[Tensor, Tensor], Tensor],
    tolerance: float | None,
) -> Edge:
    """Subtract the error that was measured, orthonormalise, and measure the left side too.

    An error e_j of v towards the direction j is one of ``e_j s_j / s_i`` in u: of the smallest triplets the left
    vectors may be wrong where the right ones are not. Their error follows from the residual ``W^T u - s v``. Where a
    tolerance is given ``left_error`` leads to the left vectors themselves: they are made so, as ``s W^-T v``, in which
    such errors shrink instead, and corrected until they are within the tolerance.
    """
    rank = off.shape[1]
    v, r = torch.linalg.qr(ritz.V[:, :rank] - off)
    wv = ritz.WV[:, :rank] - (weight @ off.to(weight.dtype)).double()
    wv = torch.linalg.solve_triangular(r, wv, upper=True, left=False)
    basis = torch.linalg.qr(wv if tolerance is None else left_error(v, torch.ones_like(v[0])))[0]
    for correction in range(LEFT_CORRECTIONS + 1):
        inner, s, turn = torch.linalg.svd(basis.T @ wv)
        u, v, wv = basis @ inner, v @ turn.T, wv @ turn.T
        off = left_error(_transposed_product(weight, u) - v * s, s)
        left = float(off.square().sum(dim=0).mean().sqrt())
        if tolerance is None or not left > tolerance or correction == LEFT_CORRECTIONS:
            break
        basis = torch.linalg.qr(u - off)[0]
    return Edge(u, s, v, max(leak, left))


def rotated(
    v: Float[Tensor, "n rank"], wv: Float[Tensor, "m rank"]
) -> tuple[Float[Tensor, "m rank"], Float[Tensor, " rank"], Float[Tensor, "n rank"]]:
    """U, S and V within the span of orthonormal v: orthonormal, with ``W V = U S``, descending."""
    u, s, x = torch.linalg.svd(wv, full_matrices=False)
    return u, s, v @ x.T


def _transposed_product(weight: Float[Tensor, "m n"], u: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
    """W^T u in the type of u, in one pass over the weight."""
    u = u.contiguous()  # as LAPACK left it, its rows are slow to multiply
    found = u.new_zeros(weight.shape[1], u.shape[1])
    for first, chunk in _chunks(weight, u.dtype):
        found.addmm_(chunk.T, u[first : first + len(chunk)])
    return found


def _chunks(weight: Float[Tensor, "m n"], dtype: torch.dtype) -> Iterator[tuple[int, Float[Tensor, "rows n"]]]:
    """The weight's rows in ``dtype``, some at a time, with the number of the first."""
    rows = max(1, CHUNK // (torch.finfo(dtype).bits // 8 * weight.shape[1]))
    for first in range(0, weight.shape[0], rows):
        yield first, weight[first : first + rows].to(dtype)
