"""How to decompose a weight: the choice of a method by shape, type and what is wanted, and the dense method."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from rankwise.directions.solvers.edges import Edge, block_of, by_inverse, by_products, rotated
from rankwise.directions.solvers.inverses import gram_inverse, gram_matrix
from rankwise.directions.solvers.square import by_lu

Solver = Literal["auto", "dense"]
Attempt = Callable[[], Edge | None]

logger = logging.getLogger(__name__)

# Below this side, or where a block is a larger share (one in so many) of all vectors, a dense decomposition is as fast.
LEAST_SIDE = 512
LARGEST_SHARE = {"square": 8, "tall": 16}

# The Gram matrix holds squares: a value below this share of the largest has lost half its digits in it.
GRAM_FLOOR = 3e-5
LEAST_GRAM = 256


class Solution(NamedTuple):
    """Singular triplets, how they were found, and an estimate of their leak; none of a dense method."""

    U: Float[Tensor, "m rank"]
    S: Float[Tensor, " rank"]
    V: Float[Tensor, "n rank"]
    method: str
    leak: float | None


def decompose(weight: Float[Tensor, "m n"], picked: Sequence[int], solver: Solver = "auto") -> Solution:
    """The triplets at the positions ``picked`` of the descending spectrum, in float64.

    Args:
        weight: finite, of any real dtype.
        picked: distinct positions; ascending, or descending from the last.
        solver: see :func:`rankwise.directions.triplets.triplets`.
    """
    if weight.shape[0] < weight.shape[1]:
        found = decompose(weight.T, picked, solver)
        return found._replace(U=found.V, V=found.U)
    scale = _power_of_two(weight)
    work = weight.to(torch.promote_types(weight.dtype, torch.float32))
    work = work if scale == 1 else work / scale
    fast = _fast(work, picked) if solver == "auto" else None
    found = _dense(work, picked) if fast is None else fast
    return found._replace(S=found.S * scale)


def _fast(weight: Float[Tensor, "m n"], picked: Sequence[int]) -> Solution | None:
    """By the first method that reaches the tolerance, with a line in the log for each that does not."""
    tolerance = 1e-7 if weight.dtype == torch.float64 else 1e-3
    for method, attempt in _attempts(weight, picked, tolerance):
        try:
            edge = attempt()
        except LinAlgError:  # so close to singular that its inverse overflows
            edge = None
        if edge is not None and edge.leak <= tolerance:
            return _ordered(edge.U, edge.S, edge.V, picked, method, edge.leak)
        problem = "it cannot be factorised" if edge is None else f"the leak may be {edge.leak:.1e}"
        logger.info("%s of a weight of shape %s: %s, another way is taken", method, tuple(weight.shape), problem)
    return None


def _dense(weight: Float[Tensor, "m n"], picked: Sequence[int]) -> Solution:
    """By the eigenvectors of the Gram matrix where its squares keep enough digits, else by an SVD; in float64."""
    chosen = list(picked)
    if weight.shape[1] >= LEAST_GRAM and weight.dtype != torch.float64:
        values, vectors = torch.linalg.eigh(gram_matrix(weight, torch.float64))
        if values[0] > GRAM_FLOOR**2 * values[-1]:
            v = vectors.flip(1)[:, chosen]
            return _ordered(*rotated(v, weight.double() @ v), picked, "dense", None)
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return Solution(u[:, chosen], s[chosen], vh[chosen].T, "dense", None)


def _attempts(weight: Float[Tensor, "m n"], picked: Sequence[int], tolerance: float) -> Iterator[tuple[str, Attempt]]:
    """Methods for one end of the spectrum, the fastest first."""
    (m, n), rank = weight.shape, len(picked)
    if n < LEAST_SIDE or block_of(rank) * LARGEST_SHARE["square" if m == n else "tall"] > n:
        return
    if list(picked) == list(range(rank)):
        yield "products", functools.partial(by_products, weight, rank, tolerance)
        yield "Gram matrix", functools.partial(_by_gram, weight, rank, weight.dtype, tolerance, smallest=False)
    elif list(picked) == list(range(n - 1, n - 1 - rank, -1)):
        name, method = ("LU", by_lu) if m == n else ("Gram matrix", _by_gram)
        for dtype in dict.fromkeys((weight.dtype, torch.float64)):
            exact = f"{name} in {str(dtype).removeprefix('torch.')}"
            yield exact, functools.partial(method, weight, rank, dtype, tolerance)


def _by_gram(
    weight: Float[Tensor, "m n"], rank: int, dtype: torch.dtype, tolerance: float, smallest: bool = True
) -> Edge | None:
    inverse = gram_inverse(weight, dtype, smallest)
    return by_inverse(weight, rank, inverse, tolerance) if inverse else None


def _ordered(
    u: Float[Tensor, "m rank"],
    s: Float[Tensor, " rank"],
    v: Float[Tensor, "n rank"],
    picked: Sequence[int],
    method: str,
    leak: float | None,
) -> Solution:
    """Descending triplets in the order of ``picked``."""
    if picked[0] > picked[-1]:
        u, s, v = u.flip(1), s.flip(0), v.flip(1)
    return Solution(u, s, v, method, leak)


def _power_of_two(weight: Tensor) -> float:
    """A scale, exact to divide by, at which squares neither overflow nor vanish; 1 where that is so already."""
    largest = max(abs(float(end)) for end in torch.aminmax(weight))
    return 1.0 if largest == 0 or 1e-6 < largest < 1e6 else 2.0 ** math.floor(math.log2(largest))
