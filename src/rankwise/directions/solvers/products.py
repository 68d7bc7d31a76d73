"""Products with a weight in a wider type than its own, some of its rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

# Bytes of a weight's rows that are held in the wider type at a time: they stay in a processor's cache.
CHUNK = 8 << 20


def product_and_transposed(
    weight: Float[Tensor, "m n"], v: Float[Tensor, "n k"], u: Float[Tensor, "m l"]
) -> tuple[Float[Tensor, "m k"], Float[Tensor, "n l"]]:
    """W v and W^T u, in the type of v and u and in one pass over the weight."""
    forward = v.new_empty(weight.shape[0], v.shape[1])
    back = u.new_zeros(weight.shape[1], u.shape[1])
    for first, chunk in _chunks(weight, v.dtype):
        rows = slice(first, first + len(chunk))
        forward[rows] = chunk @ v
        back.addmm_(chunk.T, u[rows])
    return forward, back


def transposed_product(weight: Float[Tensor, "m n"], u: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
    """W^T u in the type of u."""
    u = u.contiguous()  # as LAPACK left it, its rows are slow to multiply
    found = u.new_zeros(weight.shape[1], u.shape[1])
    for first, chunk in _chunks(weight, u.dtype):
        found.addmm_(chunk.T, u[first : first + len(chunk)])
    return found


def gram_product(
    weight: Float[Tensor, "m n"], v: Float[Tensor, "n k"]
) -> tuple[Float[Tensor, "m k"], Float[Tensor, "n k"]]:
    """W v and W^T W v, in the type of v and in one pass over the weight."""
    forward = v.new_empty(weight.shape[0], v.shape[1])
    back = torch.zeros_like(v)
    for first, chunk in _chunks(weight, v.dtype):
        forward[first : first + len(chunk)] = image = chunk @ v
        back.addmm_(chunk.T, image)
    return forward, back


def _chunks(weight: Float[Tensor, "m n"], dtype: torch.dtype) -> Iterator[tuple[int, Float[Tensor, "rows n"]]]:
    """The weight's rows in ``dtype``, some at a time, with the number of the first."""
    rows = max(1, CHUNK // (torch.finfo(dtype).bits // 8 * weight.shape[1]))
    for first in range(0, weight.shape[0], rows):
        yield first, weight[first : first + rows].to(dtype)
