"""The product B A x - B0 A0 x, exactly zero at the start, at the cost of one product of twice the rank."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankwise.low_rank import column_major


class Pairs(NamedTuple):
    """The trained factors and the frozen ones they started from."""

    A: Float[Tensor, "rank in"]
    B: Float[Tensor, "out rank"]
    A0: Float[Tensor, "rank in"]
    B0: Float[Tensor, "out rank"]

    def stacked(self) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]:
        """[B - B0, B0] and [A; A - A0], whose product is B A - B0 A0."""
        a0, b0 = self.A0.to(self.A.dtype), self.B0.to(self.B.dtype)
        return torch.cat([self.B - b0, b0], dim=1), torch.cat([self.A, self.A - a0], dim=0)


def add_difference(
    result: Float[Tensor, "*batch out"], x: Float[Tensor, "*batch in"], pairs: Pairs, scaling: float
) -> Float[Tensor, "*batch out"]:
    """``result + scaling (B A - B0 A0) x``, computed as ``scaling ((B - B0) A + B0 (A - A0)) x``.

    The gradients of A and B are those of ``scaling B A x``, formed at rank r; only x and A x are kept for them. Under
    autocast the differences are formed in the factors' own dtype and cast then, as autocast casts a weight.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else pairs.A.dtype
    added: Tensor = _AddDifference.apply(result, x.to(dtype), *pairs, scaling)  # type: ignore[no-untyped-call]
    return added


class _AddDifference(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, result: Tensor, x: Tensor, a: Tensor, b: Tensor, a0: Tensor, b0: Tensor, scaling: float
    ) -> Tensor:
        tall, wide = (factor.to(x.dtype) for factor in Pairs(a, b, a0, b0).stacked())
        rows = x.reshape(-1, x.shape[-1])
        hidden = rows @ wide.T
        ctx.scaling = scaling
        ctx.save_for_backward(x, hidden[:, : len(a)].clone(), a, b, a0, b0)
        if result.dtype != x.dtype:
            return result + (hidden @ tall.T * scaling).reshape(result.shape)
        flat = result.reshape(-1, result.shape[-1])
        return torch.addmm(flat, hidden, tall.T, alpha=scaling).reshape(result.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, a, b, a0, b0 = ctx.saved_tensors
        of_result, of_x, of_a, of_b = ctx.needs_input_grad[:4]
        rank = len(a)
        rows = x.reshape(-1, x.shape[-1])
        flat = gradient.reshape(-1, gradient.shape[-1]).to(x.dtype)
        found: list[Tensor | None] = [gradient if of_result else None, None, None, None]
        if of_x:
            tall, wide = (factor.to(x.dtype) for factor in Pairs(a, b, a0, b0).stacked())
            back = flat @ column_major(tall) * ctx.scaling
            found[1] = (back @ wide).reshape(x.shape)
            back = back[:, :rank] + back[:, rank:]
        elif of_a:
            back = flat @ column_major(b.to(x.dtype)) * ctx.scaling
        if of_a:
            found[2] = (back.T @ rows).to(a.dtype)
        if of_b:  # formed transposed, in which order the product is several times as fast on a CPU
            found[3] = (hidden.T @ flat * ctx.scaling).T.to(b.dtype)
        return (*found, None, None, None)
