"""AdaLoRA's orthogonality term, for losses that are computed from logits: PEFT adds it to those of ``forward`` only."""

from __future__ import annotations

import torch
from jaxtyping import Float
from peft import AdaLoraConfig, PeftModel
from torch import Tensor, nn

from rankwise.peft_bridge import adapted_layers
from rankwise.ranks.adalora.checks import adalora_config


def orthogonality(model: nn.Module) -> Float[Tensor, ""]:
    """How far the factors are from orthonormal: the mean over layers of ``||A A^T - I||_F`` and ``||B^T B - I||_F``.

    In float32 whatever the autocast, since it is a small difference of products.

    Raises:
        UserError: the active adapter is not AdaLoRA.

    Source: AdaLoRA (arXiv 2303.10512), equation 4. PEFT takes the norms, not their squares, and so do we, for its
        weights to mean the same.
    """
    adapter, _ = adalora_config(model)
    layers = [layer for _, layer in adapted_layers(model, adapter)]
    factors = [factor.float() for layer in layers for factor in (layer.lora_A[adapter], layer.lora_B[adapter].T)]
    with torch.autocast(factors[0].device.type, enabled=False):
        norms = [torch.linalg.norm(f @ f.T - torch.eye(len(f), device=f.device)) for f in factors]
        return torch.stack([norm.to(norms[0].device) for norm in norms]).mean()


def orthogonality_loss(model: nn.Module) -> Float[Tensor, ""] | float:
    """What belongs into a loss that is computed from logits: ``orth_reg_weight`` times :func:`orthogonality`.

    PEFT adds it to the loss that the model's own ``forward`` returns, and to no other. It is 0 for any other adapter,
    and outside training, so that losses of an evaluation compare.
    """
    if not isinstance(model, PeftModel) or not model.training:
        return 0.0
    config = model.peft_config.get(model.active_adapter) if isinstance(model.active_adapter, str) else None
    if not isinstance(config, AdaLoraConfig) or not config.orth_reg_weight:
        return 0.0
    weight: float = config.orth_reg_weight
    return orthogonality(model) * weight
