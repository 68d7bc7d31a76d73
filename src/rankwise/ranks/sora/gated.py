"""The product ``result + s B (g * (A x))`` with its gradients, none larger than a row of x for each token."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankwise.low_rank import column_major


def add_gated(
    result: Float[Tensor, "*batch out"],
    x: Float[Tensor, "*batch in"],
    a: Float[Tensor, "rank in"],
    b: Float[Tensor, "out rank"],
    gate: Float[Tensor, " rank"],
    scaling: float,
) -> Float[Tensor, "*batch out"]:
    """``result + scaling B (g * (A x))``, the gate and the scaling applied to the rank numbers of each token.

    Only x and A x are kept for the gradients. Under autocast x is cast as autocast casts it, the factors with it; the
    gradient of the gate is summed in float32 at least.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else a.dtype
    added: Tensor = _AddGated.apply(result, x.to(dtype), a, b, gate, scaling)  # type: ignore[no-untyped-call]
    return added


class _AddGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: Tensor, x: Tensor, a: Tensor, b: Tensor, gate: Tensor, scaling: float) -> Tensor:
        hidden = x.reshape(-1, x.shape[-1]) @ a.to(x.dtype).T
        gated = hidden * (gate * scaling).to(x.dtype)
        ctx.scaling = scaling
        ctx.save_for_backward(x, hidden, a, b, gate)
        if result.dtype != x.dtype:
            return result + (gated @ b.to(x.dtype).T).reshape(result.shape)
        return torch.addmm(result.reshape(-1, result.shape[-1]), gated, b.to(x.dtype).T).reshape(result.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, a, b, gate = ctx.saved_tensors
        of_result, of_x, of_a, of_b, of_gate = ctx.needs_input_grad[:5]
        flat = gradient.reshape(-1, gradient.shape[-1]).to(x.dtype)
        scale = (gate * ctx.scaling).to(x.dtype)
        found: list[Tensor | None] = [gradient if of_result else None, None, None, None, None]
        if of_x or of_a or of_gate:
            back = flat @ column_major(b.to(x.dtype))
        if of_gate:
            wide = torch.promote_types(x.dtype, torch.float32)
            found[4] = ((back.to(wide) * hidden.to(wide)).sum(0) * ctx.scaling).to(gate.dtype)
        if of_x or of_a:
            back = back * scale
        if of_x:
            found[1] = (back @ a.to(x.dtype)).reshape(x.shape)
        if of_a:
            found[2] = (back.T @ x.reshape(-1, x.shape[-1])).to(a.dtype)
        if of_b:  # formed transposed, in which order the product is several times as fast on a CPU
            found[3] = ((hidden * scale).T @ flat).T.to(b.dtype)
        return (*found, None)
