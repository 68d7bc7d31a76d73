"""Each kind of adapted module as matrices: W (out, in), and an update B A with B (out, rank) and A (rank, in).

| module | W | A as PEFT keeps it | B as PEFT keeps it |
|---|---|---|---|
| ``Linear`` | its weight | ``lora_A`` | ``lora_B`` |
| ``Conv1D`` (GPT-2) | its weight transposed | ``lora_A`` | ``lora_B`` |
| ``Embedding`` | its table transposed: (dimension, number) | ``lora_embedding_A`` | ``lora_embedding_B`` |
| ``Conv1d`` to ``Conv3d`` | ``weight.flatten(1)``: (out, in x kernel) | (rank, in, kernel) | (out, rank, 1 ...) |

A matrix A of a convolution is a convolution with the base's kernel, stride and padding; B is one of kernel 1.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Num
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora.layer import Embedding, Linear, LoraLayer, _ConvNd
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional

# PEFT's layers of packed weights whose forward hands over to a variant as that of Linear does, by name, since their
# modules import the library that packs.
PACKED = ("Linear4bit", "Linear8bitLt", "HqqLoraLinear", "GPTQLoraLinear")
CONVOLUTIONS = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}


def refusal(module: nn.Module) -> str | None:
    """Why a module has no update of matrices, or None where it has one."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return _refused_convolution(base)
    if isinstance(base, nn.Embedding) and base.max_norm is not None:
        return "its max_norm changes the table whenever it is read"
    if isinstance(base, nn.MultiheadAttention):
        return "it keeps three weights in one; adapt a model whose attention has Linear modules"
    if isinstance(base, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "torch's MultiheadAttention reads its weight without calling it, so that an adapter would have no effect"
    if isinstance(module, LoraLayer) and not isinstance(module, Linear | Embedding | _ConvNd):
        return None if type(module).__name__ in PACKED else f"PEFT's {type(module).__name__} takes no variant of LoRA"
    return None


def _refused_convolution(base: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> str | None:
    if base.groups > 1:
        return f"a convolution of {base.groups} groups has no single matrix, and PEFT cannot merge its adapter"
    if any(step != 1 for step in base.dilation):
        return "PEFT's adapter of a dilated convolution is not dilated, so that a saved one would compute another thing"
    if base.padding_mode != "zeros":
        return f"PEFT's adapter of a convolution pads with zeros, this one with {base.padding_mode}"
    return None


def as_matrix(layer: LoraLayer, weight: Num[Tensor, "*_"]) -> Num[Tensor, "out in"]:
    """A weight of the base layer's layout as the matrix W, a view of it."""
    if isinstance(layer, _ConvNd):
        return weight.flatten(1)
    return weight.T if _transposed(layer) else weight


def as_weight(layer: LoraLayer, matrix: Num[Tensor, "out in"]) -> Num[Tensor, "*_"]:
    """A matrix in the layout of the base layer's weight, a view of it."""
    if isinstance(layer, _ConvNd):
        return matrix.reshape(matrix.shape[0], *layer.get_base_layer().weight.shape[1:])
    return matrix.T if _transposed(layer) else matrix


def _transposed(layer: LoraLayer) -> bool:
    return isinstance(layer, Embedding) or bool(getattr(layer, "fan_in_fan_out", False))


def factor_parameters(
    layer: LoraLayer, adapter: str
) -> tuple[Float[Tensor, "rank *in"], Float[Tensor, "out rank *ones"]]:
    """A and B of an adapter as PEFT keeps them beside ``layer``: the parameters themselves."""
    if in_embedding(layer, adapter):
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def in_embedding(layer: LoraLayer, adapter: str) -> bool:
    """Whether PEFT keeps the adapter's factors as ``lora_embedding_A`` and ``_B``, without modules around them."""
    return adapter in layer.lora_embedding_A


def factor_matrices(layer: LoraLayer, adapter: str) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """B and A of an adapter, views of its parameters."""
    a, b = factor_parameters(layer, adapter)
    return b.flatten(1), a.flatten(1)


@torch.no_grad()
def svd_factors(layer: AdaLoraLayer, adapter: str) -> tuple[Float[Tensor, "out live"], Float[Tensor, "live in"]]:
    """B' = B E / (n + 1e-5) and A of AdaLoRA's directions that are alive, in float64; n is the rank it began with.

    PEFT keeps A and B of a convolution as matrices already.
    """
    a, e, b = (getattr(layer, part)[adapter].double() for part in ("lora_A", "lora_E", "lora_B"))
    live = e.flatten() != 0
    begun = (layer.ranknum[adapter] + 1e-5).double()  # the sum in float32, as PEFT's forward has it
    return b[:, live] * e[live].T / begun, a[live]


@torch.no_grad()
def set_factors(layer: LoraLayer, adapter: str, b: Float[Tensor, "out rank"], a: Float[Tensor, "rank in"]) -> None:
    """Put new values, of any rank, into B and A; the parameters stay the same objects.

    The layer's note of its rank follows; its scaling stays.
    """
    old_a, old_b = factor_parameters(layer, adapter)
    set_values(old_a, a.reshape(len(a), *old_a.shape[1:]) if old_a.ndim > 2 else a)
    set_values(old_b, b.reshape(*b.shape, *old_b.shape[2:]))
    note_rank(layer, adapter, len(a))


@torch.no_grad()
def set_values(parameter: Tensor, values: Tensor) -> None:
    """Give a parameter new values of any shape, on its own device and in its own dtype; its gradient is dropped.

    It stays the object that optimizers know it by.
    """
    if parameter.shape == values.shape:
        parameter.copy_(values)
        return
    new = values.detach().to(parameter.device, parameter.dtype).clone()
    parameter.grad = None
    # While an earlier loss is alive, so is the node that takes the parameter's gradients, with the old shape. torch
    # makes a new one where the dtype changes, not where the shape does: hence a dtype in between.
    parameter.data = parameter.data.to(torch.float64 if parameter.dtype != torch.float64 else torch.float32)
    parameter.data = new


def note_rank(layer: LoraLayer, adapter: str, rank: int) -> None:
    """Tell a layer and the modules of its factors a new rank."""
    if not in_embedding(layer, adapter):
        _note_rank(layer.lora_A[adapter], rank, narrows=True)
        _note_rank(layer.lora_B[adapter], rank, narrows=False)
    layer.r[adapter] = rank


def _note_rank(module: nn.Module, rank: int, narrows: bool) -> None:
    kind = "channels" if hasattr(module, "in_channels") else "features"
    setattr(module, f"{'out' if narrows else 'in'}_{kind}", rank)


def _kernel(layer: LoraLayer, a: Tensor) -> Tensor:
    """A as PEFT keeps it beside ``layer``."""
    return as_weight(layer, a) if isinstance(layer, _ConvNd) else a


def project(layer: LoraLayer, x: Num[Tensor, "*_"], a: Float[Tensor, "k in"]) -> Float[Tensor, "*_"]:
    """A x for the input of any kind of layer: k numbers for each token, position or place of a picture."""
    base = layer.get_base_layer()
    if isinstance(layer, Embedding):
        frequency = base.scale_grad_by_freq
        return functional.embedding(x, a.T, padding_idx=base.padding_idx, scale_grad_by_freq=frequency)
    if isinstance(layer, _ConvNd):
        convolve: Any = CONVOLUTIONS[base.weight.ndim]
        convolved: Tensor = convolve(x, _kernel(layer, a), None, base.stride, base.padding)
        return convolved
    return functional.linear(x, a)


def expand(layer: LoraLayer, hidden: Float[Tensor, "*_"], b: Float[Tensor, "out k"]) -> Float[Tensor, "*_"]:
    """B h for what :func:`project` gave."""
    if isinstance(layer, _ConvNd):
        dimensions = layer.get_base_layer().weight.ndim
        convolve: Any = CONVOLUTIONS[dimensions]
        convolved: Tensor = convolve(hidden, b.reshape(*b.shape, *[1] * (dimensions - 2)))
        return convolved
    output = functional.linear(hidden, b)
    scale = layer._get_embed_scale() if isinstance(layer, Embedding) else None
    return output if scale is None else output * scale.to(output.dtype)


def along(layer: LoraLayer, hidden: Float[Tensor, "*_"], values: Float[Tensor, " k"]) -> Float[Tensor, "*_"]:
    """One value for each of the k numbers of ``hidden``, multiplied."""
    values = values.to(hidden.dtype)
    if isinstance(layer, _ConvNd):
        return hidden * values.reshape(-1, *[1] * (layer.get_base_layer().weight.ndim - 2))
    return hidden * values


def direction_axis(layer: LoraLayer) -> int:
    """The axis of :func:`project`'s output that counts directions, from the end."""
    return 1 - layer.get_base_layer().weight.ndim if isinstance(layer, _ConvNd) else -1
