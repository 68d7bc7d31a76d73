"""Factorisations of a weight whose inverse brings its smallest singular directions to the front."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.directions.solvers.krylov import Map

# Products that find an end of a Gram matrix's spectrum, and how far beyond what they find a shift is put.
PROBES = 30
BEYOND = 0.93


class Inverse(NamedTuple):
    """``F^-1`` for a factor with ``F^T F = sign (W^T W - shift)``, in ``dtype``."""

    map: Map
    shift: float
    sign: int
    dtype: torch.dtype


def lu_inverse(weight: Float[Tensor, "n n"]) -> Inverse:
    """F = W, by LU with partial pivoting; a zero pivot becomes one at rounding level, as inverse iteration allows."""
    factors, pivots, _ = torch.linalg.lu_factor_ex(weight.T)  # of the transpose, which is stored as LAPACK wants it
    diagonal = factors.diagonal()
    least = torch.finfo(weight.dtype).eps * diagonal.abs().max()
    diagonal.copy_(torch.where(diagonal.abs() < least, least, diagonal))
    solve = functools.partial(torch.linalg.lu_solve, factors, pivots)
    return Inverse(Map(functools.partial(solve, adjoint=True), solve), 0.0, 1, weight.dtype)


def gram_inverse(weight: Float[Tensor, "m n"], dtype: torch.dtype, smallest: bool) -> Inverse | None:
    """F = L^T of the Cholesky factorisation ``L L^T = sign (W^T W - shift)``, or None where ``dtype`` cannot hold it.

    A shift just outside the spectrum spreads a dense edge apart. It is sought by a few products; where the
    factorisation shows that it is not below the smallest values, there is no shift.
    """
    gram = gram_matrix(weight, dtype)
    low, high = _ends(gram)
    sign = 1 if smallest else -1
    for shift in (BEYOND * low, 0.0) if smallest else (high / BEYOND,):
        shifted = sign * gram
        shifted.diagonal().sub_(sign * shift)
        lower, failed = torch.linalg.cholesky_ex(shifted)
        if not failed:
            solve = functools.partial(torch.linalg.solve_triangular, lower.T, upper=True)
            transposed = functools.partial(torch.linalg.solve_triangular, lower, upper=False)
            return Inverse(Map(solve, transposed), shift, sign, dtype)
    return None


def gram_matrix(weight: Float[Tensor, "m n"], dtype: torch.dtype, parts: int = 4) -> Float[Tensor, "n n"]:
    """W^T W, whose upper blocks are the lower ones mirrored; W is cast a slice of columns at a time."""
    n = weight.shape[1]
    gram = torch.empty(n, n, dtype=dtype, device=weight.device)
    edges = [n * part // parts for part in range(parts + 1)]
    slices = [slice(first, last) for first, last in itertools.pairwise(edges) if last > first]
    for done, rows in enumerate(slices):
        left = weight[:, rows].to(dtype)
        for columns in slices[: done + 1]:
            block = left.T @ weight[:, columns].to(dtype)
            gram[rows, columns] = block
            gram[columns, rows] = block.T
    return gram


def _ends(gram: Float[Tensor, "n n"]) -> tuple[float, float]:
    """Bounds from inside of the smallest and largest eigenvalue, by Lanczos with full orthogonalisation."""
    n = gram.shape[0]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(n, 1, generator=generator, dtype=gram.dtype).to(gram.device)
    basis = torch.linalg.qr(start)[0]
    for _ in range(min(PROBES, n) - 1):
        new = gram @ basis[:, -1:]
        for _ in range(2):
            new = new - basis @ (basis.T @ new)
        basis = torch.cat([basis, torch.linalg.qr(new)[0]], dim=1)
    values = torch.linalg.eigvalsh(basis.T @ (gram @ basis))
    return max(float(values[0]), 0.0), float(values[-1])
