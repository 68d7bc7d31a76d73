"""The dense weight of a module, whatever it is packed in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import UserError
from rankwise.processes import whole


@torch.no_grad()
def dense_weight(module: nn.Module) -> Tensor:
    """The weight of ``module`` as floating-point numbers, in its own layout; the module stays as it is.

    Full-precision weights are returned themselves; where they are spread over processes (FSDP2, ZeRO-3), all of which
    call this then, they are fetched. Packed ones are unpacked into a new tensor: bitsandbytes (4 and 8
    bit), torchao and HQQ.

    Raises:
        UserError: the weight is on the meta device, or packed in another way.

    Source: the layouts of bitsandbytes 0.50. ``peft.utils.integrations.dequantize_module_weight`` does not serve here:
    on a CPU it takes the scales away from an 8 bit layer that has computed before, and it misreads 4 bit weights that
    bitsandbytes has packed anew for inference on a CPU.
    """
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.is_meta:
        raise UserError(
            "its weight is on the meta device and has no values: load the model, or write the start from its files "
            "with rankwise init"
        )
    kind = type(weight).__name__
    if kind == "Params4bit":
        return _four_bits(module)
    if kind == "Int8Params":
        return _eight_bits(module)
    if hasattr(module, "W_q"):
        return torch.as_tensor(module.dequantize())  # type: ignore[operator]
    if type(weight).__module__.startswith("torchao."):
        return torch.as_tensor(weight.dequantize())  # type: ignore[union-attr]
    if isinstance(weight, Tensor) and weight.is_floating_point() and weight.element_size() > 1:
        return whole(weight)
    raise UserError(
        f"its weight ({type(module).__name__}) cannot be unpacked here: write the start from the checkpoint as it was "
        "before quantisation with rankwise init, and load that"
    )


def _four_bits(module: Any) -> Tensor:
    """W from its 4 bit codes; repacked for inference on a CPU, from the layer's outputs on unit vectors."""
    from bitsandbytes.functional import dequantize_4bit

    weight, state = module.weight, module.weight.quant_state
    if state is None:
        raise UserError("its 4 bit weight is not quantised yet: move the model to its device first")
    if not getattr(state, "packing_format_for_cpu", False):
        dense: Tensor = dequantize_4bit(weight.data, state)
        return dense
    output: Tensor = module(torch.eye(state.shape[1], device=weight.device))
    return (output if module.bias is None else output - module.bias.to(output.dtype)).T


def _eight_bits(module: Any) -> Tensor:
    """W from its 8 bit codes: code / 127 times the largest magnitude of its row."""
    weight: Any = module.weight
    scale = weight.SCB if weight.SCB is not None else module.state.SCB
    if scale is None:
        raise UserError("its 8 bit weight is not quantised yet: move the model to its device first")
    dense: Tensor = weight.data.float() * (scale.float().to(weight.device)[:, None] / 127)
    return dense
