"""Attention on a CPU, where bfloat16 makes its gradients slower, not faster."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

LARGEST = 2**14  # keys times width of a head, up to which float32 was not slower (docs/log.md)


def fast_attention(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Where attention's gradients can be faster in float32 than in what a model computes in, computes them so."""
    return Float32Attention() if device.type == "cpu" and dtype == torch.bfloat16 else nullcontext()


class Float32Attention(TorchFunctionMode):
    """Within it, ``scaled_dot_product_attention`` in bfloat16 on a CPU computes in float32.

    softmax(Q K' / sqrt(d) + mask) V and its gradients, in float32; what comes out is bfloat16. That is so for Q, K, V
    in bfloat16, and under autocast to it, of up to ``LARGEST`` keys times the width of a head: there the backward pass
    of torch 2.13's kernel takes up to nine times as long in bfloat16. Everything else, other devices and other dtypes
    are left as they are. No score is stored, as in that kernel.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Each call of a torch function within, as torch asks for it."""
        if func is functional.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **named: Any
) -> Tensor:
    """Torch's own, by its arguments."""
    attention = functional.scaled_dot_product_attention
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    if query.device.type != "cpu" or dtype != torch.bfloat16 or key.shape[-2] * key.shape[-1] > LARGEST:
        return attention(query, key, value, attn_mask, *rest, **named)
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.float()
    with torch.autocast("cpu", enabled=False):
        return attention(query.float(), key.float(), value.float(), attn_mask, *rest, **named).to(dtype)
