"""MiLoRA with DoRA: a trained magnitude for each output, the direction from the pretrained weight and the update."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from rankwise.directions.dequantise import dense_weight
from rankwise.directions.difference import add_difference
from rankwise.directions.variants import SpectralVariant
from rankwise.peft_bridge.matrices import as_matrix, as_weight

MAGNITUDE = "lora_magnitude_vector"


class SpectralDoraVariant(SpectralVariant):
    """W' = m (W + D) / ||W + D||, D = s (B A - B0 A0), norms over each output's row; m starts at the norms of W.

    The start is the base exactly in the dtypes it was made in; where the model is cast afterwards (``.bfloat16()``),
    m and the norms round apart, and it is exact to the rounding of that dtype only.

    The norm is detached from the gradient. Saved with [A; A0] and [B, -B0] it is PEFT's own DoRA of rank 2r.

    Source: DoRA (arXiv 2402.09353), section 4.3.
    """

    is_low_rank = False

    def start(self, layer: LoraLayer, adapter: str, config: LoraConfig) -> int:
        """As without DoRA; m becomes the norms as the forward pass computes them, so that their ratio is exactly 1."""
        zero = super().start(layer, adapter, config)
        magnitude = getattr(layer, MAGNITUDE)[adapter].weight
        if not magnitude.is_meta:
            magnitude.copy_(self.norms(layer, adapter))
        return zero

    @torch.no_grad()
    def norms(
        self, layer: LoraLayer, adapter: str, weight: Float[Tensor, "out in"] | None = None
    ) -> Float[Tensor, " out"]:
        """||W + D|| of each row, from ||W||, W A' and A' A' alone: D is never formed."""
        b, a = self.factors(layer, adapter)
        scaling = layer.scaling[adapter]
        own = as_matrix(layer, dense_weight(layer.get_base_layer())) if weight is None else weight
        own = own.to(b.device, b.dtype)
        squared = torch.linalg.vector_norm(own, dim=1).square()
        squared = squared + 2 * scaling * (own @ a.T * b).sum(dim=1) + scaling**2 * (b @ (a @ a.T) * b).sum(dim=1)
        norms: Tensor = squared.clamp_min(torch.finfo(b.dtype).tiny).sqrt()
        return norms

    def scale(
        self, layer: LoraLayer, adapter: str, weight: Float[Tensor, "out in"] | None = None
    ) -> Float[Tensor, " out"]:
        """The ratio m / ||W + D|| of each row."""
        scale: Tensor = getattr(layer, MAGNITUDE)[adapter].weight / self.norms(layer, adapter, weight)
        return scale

    def forward(self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """PEFT's hook: ``m / ||W + D|| (W + D) x`` with the bias as it was."""
        dropout = module.lora_dropout[active_adapter]
        base = module.get_base_layer()
        dropped = dropout(x)
        if isinstance(dropout, nn.Identity) or not module.training:
            plain = result if base.bias is None else result - base.bias
        else:
            weight = as_matrix(module, dense_weight(base)).to(dropped.dtype)
            plain = nn.functional.linear(dropped, weight)
        scale = self.scale(module, active_adapter)
        pairs, scaling = self.pairs(module, active_adapter), module.scaling[active_adapter]
        update = add_difference(torch.zeros_like(plain), dropped, pairs, scaling)
        scaled: Tensor = result + (scale - 1) * plain + scale * update
        return scaled

    def merge_safe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """PEFT's hook: the merged weight as a new tensor; what scaled it is kept for unmerging.

        The norm is that of the weight without the adapters merged before, as in the forward pass.
        """
        with module._unmerged_base_weight(safe_merge=True) as unmerged:
            scale = self.scale(module, active_adapter, as_matrix(module, unmerged)).detach()
        module._cache_store(f"{active_adapter}-scale", scale)
        current = as_matrix(module, dense_weight(module.get_base_layer()))
        delta = as_matrix(module, self.delta(module, active_adapter)).to(current.device)
        merged = scale[:, None].to(current.device) * (current + delta)
        return as_weight(module, merged).to(orig_weight.dtype)

    def unmerge(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """PEFT's hook: the weight without magnitude and update."""
        scale = module._cache_pop(f"{active_adapter}-scale")[:, None].to(orig_weight.device)
        merged = as_matrix(module, orig_weight.data)
        delta = as_matrix(module, self.delta(module, active_adapter)).to(orig_weight.device)
        weight = torch.where(scale == 0, 0, merged / scale) - delta
        return as_weight(module, weight).to(orig_weight.dtype)
