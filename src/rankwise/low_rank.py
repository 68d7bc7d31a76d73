"""The mathematics of a product of two small matrices: its singular values, its best cut, and distances between two."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

Factors = tuple[Tensor, Tensor]

# Singular values below this share of the largest are rounding of the factors' product, not directions.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Loss:
    """What a written update lacks of the trained one.

    Attributes:
        norm: Frobenius norm of the trained update.
        lost: Frobenius norm of the difference.
    """

    norm: float
    lost: float

    @property
    def relative(self) -> float:
        """The difference as a share of the update; 0 where there is no update."""
        return self.lost / self.norm if self.norm else 0.0


def balanced_svd(
    b: Float[Tensor, "out k"], a: Float[Tensor, "k in"]
) -> tuple[Float[Tensor, "out q"], Float[Tensor, " q"], Float[Tensor, "q in"]]:
    """U, S, Vh of ``b @ a`` by thin QR of both factors and the SVD of the small product, without the large one.

    Args:
        b: left factor.
        a: right factor; both in float64 where the result is to be exact to rounding in float32.

    Returns:
        U, S descending and Vh; q is at most the smallest of out, in and k.
    """
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, s, vh @ q_a.T


def kept_rank(s: Float[Tensor, " q"], rank: int | None = None, energy: float | None = None) -> int:
    """Directions to keep: those above rounding, then by energy, then by rank; 0 where all is zero.

    Args:
        s: singular values, descending.
        rank: the most to keep.
        energy: keep the fewest that hold this share of the squared norm; above 0, at most 1.
    """
    if not len(s) or s[0] == 0:
        return 0
    count = int((s > s[0] * ROUNDING).sum())
    if energy is not None:
        shares = s.square().cumsum(0) / s.square().sum()
        count = min(count, int((shares < energy - 1e-12).sum()) + 1)
    return count if rank is None else min(count, rank)


def halves(u: Float[Tensor, "out q"], s: Float[Tensor, " q"], vh: Float[Tensor, "q in"], rank: int) -> Factors:
    """``U sqrt(S)`` and ``sqrt(S) Vh`` of the first ``rank`` directions, in float32."""
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).float(), (root[:, None] * vh[:rank]).float()


def padded(b: Float[Tensor, "out k"], a: Float[Tensor, "k in"], rank: int) -> Factors:
    """The same product at a larger rank: zero columns for b, zero rows for a."""
    more = rank - b.shape[1]
    return nn.functional.pad(b, (0, more)), nn.functional.pad(a, (0, 0, 0, more))


def column_major(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """The same matrix with its columns contiguous: a product with a thin one then takes half the time on a CPU."""
    return matrix.T.contiguous().T


def product_norm(b: Float[Tensor, "out k"], a: Float[Tensor, "k in"]) -> float:
    """Frobenius norm of ``b @ a``, in float64, from the triangles of two thin QR."""
    r_b = torch.linalg.qr(b.double(), mode="r").R
    r_a = torch.linalg.qr(a.double().T, mode="r").R
    return float(torch.linalg.norm(r_b @ r_a.T))


def distance(one: Factors, other: Factors) -> float:
    """Frobenius norm of the difference of two products of factors ``(b, a)``, in float64.

    Exact to float64's rounding of the larger product, so that float32's rounding of written factors is seen.
    """
    (b, a), (c, d) = one, other
    return product_norm(torch.cat([b.double(), -c.double()], dim=1), torch.cat([a.double(), d.double()], dim=0))
