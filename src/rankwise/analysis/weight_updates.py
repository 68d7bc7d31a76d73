"""Each weight of a trained model with its update: two small matrices where it is a product of such, else one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from peft import PeftModel
from peft.tuners.lora.layer import Embedding, Linear, LoraLayer, _ConvNd
from peft.tuners.vera.layer import Linear as VeraLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankwise.directions.dequantise import dense_weight
from rankwise.errors import UserError
from rankwise.low_rank import Factors
from rankwise.methods.in_place import trains_all, weights_before
from rankwise.peft_bridge import active_adapter, adapted_layers, matrix_factors
from rankwise.peft_bridge.matrices import as_matrix
from rankwise.peft_bridge.merging import merged_in_float64

Update = Factors | Float[Tensor, "out in"]


def weight_updates(model: PeftModel) -> Iterator[tuple[str, Float[Tensor, "out in"] | None, Update | None]]:
    """Name, weight W before training and update D of each module that was adapted or, in full fine-tuning, each linear.

    D is B (out, rank) and A (rank, in), the scaling in B, or where it is no such product (DoRA's, that of a weight
    which was trained itself, or VeRA's, whose rank is high) one matrix, formed for that module alone; both are None
    where its form is not known. The output layer and a classifier's head, which LoRA does not adapt, are left out of
    full fine-tuning too, and experts that share one tensor.
    """
    if trains_all(model):
        yield from _trained(model)
        return
    adapter = active_adapter(model)
    for name, layer in adapted_layers(model, adapter):
        update = _update(layer, adapter, name)
        if update is None:
            yield name, None, None
        else:
            yield name, as_matrix(layer, dense_weight(layer.get_base_layer())), update
    yield from _vera(model, adapter)


def _vera(model: PeftModel, adapter: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, VeraLinear) and adapter in layer.vera_lambda_d:
            weight, update = dense_weight(layer.get_base_layer()), layer.get_delta_weight(adapter).detach()
            yield name, *((weight.T, update.T) if layer.fan_in_fan_out else (weight, update))


def _trained(model: PeftModel) -> Iterator[tuple[str, Tensor, Tensor]]:
    base, before = model.get_base_model(), weights_before(model)
    body = getattr(base, base.base_model_prefix, base)
    inside = {id(module) for module in body.modules()} - {id(base.get_output_embeddings())}
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and id(module) in inside and module.weight in before:
            weight = before[module.weight].to(module.weight.device)
            update = module.weight.detach().to(_exact(weight)) - weight.to(_exact(weight))
            yield name, *((weight.T, update.T) if isinstance(module, Conv1D) else (weight, update))


def _exact(weight: Tensor) -> torch.dtype:
    """In which the difference of two neighbouring numbers of the weight's dtype is exact."""
    return torch.promote_types(weight.dtype, torch.float32)


def _update(layer: LoraLayer, adapter: str, name: str) -> Update | None:
    try:
        b, a = matrix_factors(layer, adapter, name)
    except UserError:
        try:
            return _merged(layer, adapter) if isinstance(layer, Linear | Embedding | _ConvNd) else None
        except NotImplementedError:  # a variant that PEFT does not merge
            return None
    return b * layer.scaling[adapter], a


def _merged(layer: LoraLayer, adapter: str) -> Float[Tensor, "out in"]:
    weight = layer.get_base_layer().weight
    with merged_in_float64(layer, adapter) as before:
        update = weight.data - before[weight].double()
    return as_matrix(layer, update)
