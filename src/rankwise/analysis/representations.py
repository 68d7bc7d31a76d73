"""How far a model's representations have drifted."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.errors import UserError


def linear_cka(first: Float[Tensor, "rows k"], second: Float[Tensor, "rows l"]) -> float:
    """Centred kernel alignment of two representations of the same rows, ``||Y^T X||^2 / (||X^T X|| ||Y^T Y||)``.

    X and Y are the columns less their means, norms are Frobenius's. It is 1 where one is the other turned, moved and
    scaled, and 0 where their columns are uncorrelated.

    Source: Kornblith et al., arXiv 1905.00414, section 3.

    Args:
        first: a vector for each row, such as the hidden states of tokens in one layer before training.
        second: vectors of the same rows, of that layer after training, say.

    Raises:
        UserError: there are fewer than two rows, numbers of rows differ, or a side does not vary or is not finite.
    """
    if first.shape[0] != second.shape[0] or first.shape[0] < 2:
        raise UserError(f"the same two rows or more are compared, not {first.shape[0]} and {second.shape[0]}")
    x, y = (side.double() - side.double().mean(dim=0) for side in (first, second))
    own, other = torch.linalg.norm(x.T @ x), torch.linalg.norm(y.T @ y)
    if not bool(torch.isfinite(own * other)) or float(own) == 0 or float(other) == 0:
        raise UserError("a representation that does not vary over rows, or is not finite, cannot be compared")
    return float((y.T @ x).square().sum() / (own * other))
