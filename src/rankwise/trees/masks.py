"""Who sees whom in rows of trees: a token sees those on its path from the root, itself included.

In depth-first order that is an interval test: query q sees key k where ``k <= q < ends[k]``. Trees of one row, and the
filling, keep apart by the same test.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rankwise.likelihood import unwrapped

DENSE, FLEX = ("sdpa", "eager"), "flex_attention"


def dense_mask(ends: Int[Tensor, "rows width"]) -> Bool[Tensor, "rows 1 width width"]:
    """True where a query (third axis) sees a key (fourth axis)."""
    places = torch.arange(ends.shape[1], device=ends.device)
    not_later = places[:, None] >= places
    return (not_later & (places[:, None] < ends[:, None, :]))[:, None]


def additive_mask(
    seen: Bool[Tensor, "rows 1 queries keys"], dtype: torch.dtype
) -> Float[Tensor, "rows 1 queries keys"]:
    """0 where a query sees a key, else the dtype's lowest number: for attention that adds its mask to the scores."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def block_mask(ends: Int[Tensor, "rows width"]) -> Any:
    """The same for FlexAttention (torch.nn.attention.flex_attention.BlockMask): blocks that nobody sees are skipped."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, width = ends.shape
    return create_block_mask(
        lambda row, _, query, key: (key <= query) & (query < ends[row, key]),
        B=rows,
        H=None,
        Q_LEN=width,
        KV_LEN=width,
        device=ends.device,
    )


def attention_of(model: nn.Module) -> str:
    """The name of the attention that a language model was loaded with."""
    return str(unwrapped(model).config.get_text_config()._attn_implementation)


def attention_mask_for(model: nn.Module, ends: Int[Tensor, "rows width"]) -> Any:
    """The mask as the model's attention wants it; `why_no_trees` says which attention takes one."""
    return block_mask(ends) if attention_of(model) == FLEX else as_taken(model, dense_mask(ends))


def as_taken(model: nn.Module, seen: Bool[Tensor, "rows 1 queries keys"]) -> Tensor:
    """A dense mask as the model's attention takes it: eager attention adds it, the others read it as it is."""
    return additive_mask(seen, unwrapped(model).dtype) if attention_of(model) == "eager" else seen
