"""The proximal step that makes gates sparse, and the published variant of it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.errors import UserError


def soft_threshold(x: Float[Tensor, "*shape"], threshold: float) -> Float[Tensor, "*shape"]:
    """Compute ``sign(x) * max(|x| - threshold, 0)``: the proximal map of ``threshold * ||x||_1``.

    Args:
        x: any shape.
        threshold: 0 or more, in the units of x.

    Raises:
        UserError: a negative threshold.

    Source: SoRA (arXiv 2311.11696), equation 6. The authors' code differs: see :func:`published_step`.
    """
    if not threshold >= 0:
        raise UserError(f"threshold {threshold} is not possible: it must be 0 or more")
    return torch.sign(x) * torch.clamp(x.abs() - threshold, min=0)


def published_step(x: Float[Tensor, "*shape"], threshold: float) -> Float[Tensor, "*shape"]:
    """The step of SoRA's published code: shrink by the threshold, then zero all that is still below it.

    What starts between one and two thresholds becomes zero as well, so it is no proximal map; kept for reproduction.
    """
    shrunk = soft_threshold(x, threshold)
    return torch.where(shrunk.abs() < threshold, torch.zeros_like(shrunk), shrunk)
