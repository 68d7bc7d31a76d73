"""The start of an adapter: A0 and B0 of a weight's chosen directions, also where those have no singular value."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.directions.cache import start_cache
from rankwise.directions.triplets import Part, check_weight, triplets
from rankwise.errors import UserError, nearest

StartPart = Part | Literal["qr"]

# Norm of a row of A in PEFT's usual start, uniform with variance 1 / (3 in).
USUAL_NORM = 3**-0.5


class Start(NamedTuple):
    """B0 and A0 with ``scaling * B0 A0`` the chosen part of a weight, and how many directions are numerically zero."""

    B: Float[Tensor, "out rank"]
    A: Float[Tensor, "rank in"]
    zero: int


@torch.no_grad()
def spectral_start(
    weight: Float[Tensor, "out in"],
    rank: int,
    part: StartPart,
    seed: int = 0,
    scaling: float = 1.0,
    cache: str | None = None,
) -> Start:
    """B0 = U sqrt(S / scaling) and A0 = sqrt(S / scaling) Vh of one part of a weight's spectrum.

    A singular value s_i <= eps s_max, eps being float32's, has no usable root: there A0_i = v_i / sqrt(3), the norm of
    PEFT's usual row, and B0_i = 0. The product stays what it was to rounding, and the direction can be trained.

    With ``qr`` they are no part of the spectrum: W = Q R, B0 the first columns of Q and A0 the first rows of R,
    whatever the scaling (OLoRA, arXiv 2406.01775, section 3).

    Args:
        weight: a matrix of any real dtype, finite.
        rank: 1 to the weight's smaller side.
        part: of the spectrum, or ``qr``.
        seed: of the draw for ``random``.
        scaling: of the layer, above 0.
        cache: folder of finished decompositions, looked up by the weight's content; none where it is not given.

    Returns:
        B0, A0 in float32 (float64 for a float64 weight) and the number of directions that are numerically zero.

    Raises:
        UserError: an unknown part, a rank or scaling out of range, or a weight that is no finite matrix.
    """
    if not scaling > 0:
        raise UserError(f"a scaling of {scaling} has no start: it must be above 0")
    if part == "qr":
        return _orthonormal_start(weight, rank)
    solve = start_cache(cache).triplets if cache else triplets
    u, s, vh = solve(weight, rank, part, seed)
    zero = s <= torch.finfo(torch.float32).eps * _largest(weight, float(s.min()))
    root = (s.clamp_min(0) / scaling).sqrt()
    a0 = torch.where(zero, torch.full_like(root, USUAL_NORM), root)[:, None] * vh
    b0 = u * torch.where(zero, torch.zeros_like(root), root)
    return Start(b0, a0, int(zero.sum()))


def check_start_part(part: str) -> None:
    """Raise a ``UserError`` for an unknown part of the spectrum that is not ``qr`` either."""
    known = (*get_args(Part), "qr")
    if part not in known:
        raise UserError(f"part {part!r} of the spectrum is unknown: {nearest(part, known)}")


def _orthonormal_start(weight: Float[Tensor, "out in"], rank: int) -> Start:
    """B0 = Q[:, :rank] and A0 = R[:rank] of W = Q R, decomposed in float64; a zero row of A0 can be trained."""
    check_weight(weight, rank)
    with torch.autocast(weight.device.type, enabled=False):
        q, r = torch.linalg.qr(weight.detach().double())
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return Start(q[:, :rank].to(dtype).contiguous(), r[:rank].to(dtype).contiguous(), 0)


def _largest(weight: Float[Tensor, "out in"], smallest: float) -> float:
    """The largest singular value, or the Frobenius norm above it where even by that ``smallest`` is not zero."""
    norm = float(torch.linalg.matrix_norm(weight.to(torch.promote_types(weight.dtype, torch.float32))))
    return norm if smallest > torch.finfo(torch.float32).eps * norm else spectral_norm(weight)


def spectral_norm(weight: Float[Tensor, "out in"], steps: int = 12) -> float:
    """The largest singular value, from below, by power iteration: within a few percent."""
    wide = weight if weight.dtype == torch.float64 else weight.float()
    vector = torch.randn(wide.shape[1], generator=torch.Generator().manual_seed(0)).to(wide)
    norm = 0.0
    for _ in range(steps):
        vector = vector / vector.norm().clamp_min(torch.finfo(vector.dtype).tiny)
        image = wide @ vector
        norm = float(image.norm())
        vector = wide.T @ image
    return norm
