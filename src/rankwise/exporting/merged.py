"""Write a whole model with its adapter merged in, one weight in memory at a time, and measure what rounding loses."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import PeftModel
from peft.tuners.lora.layer import _ConvNd
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.errors import UserError
from rankwise.low_rank import Loss
from rankwise.methods.bottleneck import BottleneckLayer
from rankwise.peft_bridge import tuner_layers
from rankwise.peft_bridge.matrices import refusal
from rankwise.peft_bridge.merging import merged_in_float64


def check_mergeable(model: PeftModel, adapter: str) -> None:
    """Refuse a model whose merged weights cannot be written.

    Raises:
        UserError: no model of transformers, a quantised or offloaded base, tied adapters, replicated layers, or an
            adapter that is merged already.
    """
    base = model.get_base_model()
    if not isinstance(base, PreTrainedModel):
        kind = type(base).__name__
        raise UserError(f"layout 'merged' writes models of transformers, not {kind}: merge and save it yourself")
    if getattr(base, "hf_quantizer", None) is not None:
        raise UserError(
            "layout 'merged' needs full-precision weights, and the base is quantised: load the original base with "
            "this adapter and merge there, or take layout='uniform'"
        )
    for name, config in model.peft_config.items():
        if getattr(config, "target_modules_to_tie", None):
            raise UserError(
                f"adapter {name!r} has ensure_weight_tying=True: its tied modules share their factors, and cannot be "
                "merged one by one: take layout='uniform'"
            )
        if getattr(config, "layer_replication", None):
            raise UserError(
                f"adapter {name!r} has layer_replication={config.layer_replication}: the copies of a layer share one "
                "weight, and are merged to different ones: take layout='uniform'"
            )
    if model.peft_config[adapter].is_prompt_learning:
        kind = type(model.peft_config[adapter]).__name__
        raise UserError(f"adapter {adapter!r} ({kind}) trains no weight that could be merged: take layout='own'")
    for name, layer in tuner_layers(model, adapter):
        if isinstance(layer, BottleneckLayer):
            raise UserError(f"{name}: a bottleneck is not linear and cannot be merged: take layout='own'")
        if layer.merged:
            raise UserError(f"{name}: {', '.join(layer.merged_adapters)} is merged already: unmerge_adapter() first")
        if any(weight.is_meta for weight in layer.parameters()):
            raise UserError(f"{name}: its weights are offloaded: load the whole model into memory to merge it")
        if isinstance(layer, _ConvNd) and (reason := refusal(layer)):
            raise UserError(f"{name}: {reason}: take layout='uniform'")


def write_merged(model: PeftModel, adapter: str, folder: Path) -> tuple[dict[str, Loss], int]:
    """Write W + update for each adapted weight, and all others as they are, as ``save_pretrained`` does.

    The update is added in float64 and rounded once, to the weight's own dtype. Merged weights are kept in files beside
    the result until they are written. The model itself is not changed; tied weights of which one is adapted are untied
    in what is written.

    Memory beyond the model's own is about ten times the largest adapted weight in float64, however many there are.

    Args:
        model: checked by :func:`check_mergeable`.
        adapter: name of the one to merge.
        folder: exists and is empty.

    Returns:
        The update and its loss for each adapted layer, and the number of the written model's parameters.

    Raises:
        UserError: a merged weight is not finite in the base's dtype.
    """
    merged = _twin(model)
    updates = {}
    with TemporaryDirectory(dir=folder) as scratch:
        for name, layer in list(tuner_layers(merged, adapter)):
            _untie(merged.get_base_model(), layer)
            try:
                updates[name] = _merge(layer, adapter, Path(scratch) / name)
            except (ValueError, OverflowError) as error:  # PEFT's word for a sum that is not finite, and ours
                raise UserError(f"{name}: its merged weight is not finite: {error}") from error
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT tells of each layer that it is merged already
            whole = merged.merge_and_unload(adapter_names=[adapter])
        whole.save_pretrained(folder)
        return updates, sum(weight.numel() for weight in whole.parameters())


def _twin(model: PeftModel) -> PeftModel:
    """A copy of the modules and settings that shares every number with the model."""
    shared: dict[int, object] = {id(buffer): buffer for buffer in model.buffers()}
    for weight in model.parameters():
        shared[id(weight)] = nn.Parameter(weight.data, requires_grad=weight.requires_grad)
    return copy.deepcopy(model, shared)


def _untie(base: nn.Module, layer: BaseTunerLayer) -> None:
    """Give a layer weights of its own where another module holds them too and would change with them."""
    own = layer.get_base_layer()
    held = {id(weight) for module in base.modules() if module is not own for weight in module._parameters.values()}
    for name, weight in own.named_parameters(recurse=False):
        if id(weight) in held:
            setattr(own, name, nn.Parameter(weight.data, requires_grad=weight.requires_grad))


def _merge(layer: BaseTunerLayer, adapter: str, file: Path) -> Loss:
    """Merge in float64; keep the rounded weights on disk."""
    norm = lost = 0.0
    with merged_in_float64(layer, adapter) as weights:
        for number, weight in enumerate(layer.get_base_layer().parameters()):
            update = weight.data - weights[weight].double()
            if update.any():
                rounded = _on_disk(weight.data.to(weights[weight].dtype), file.with_name(f"{file.name}.{number}"))
                if not torch.isfinite(rounded).all():
                    raise OverflowError(
                        f"it is too large for {rounded.dtype}; load the base in torch.bfloat16 or float32"
                    )
                error = rounded.to(update) - weights[weight].double() - update
                norm, lost = norm + float(update.square().sum()), lost + float(error.square().sum())
                weights[weight] = rounded
    layer.merged_adapters.append(adapter)  # what lies there is merged
    return Loss(norm**0.5, lost**0.5)


def _on_disk(weight: Tensor, file: Path) -> Tensor:
    """A copy that lies in a file and is paged in by the system; written first, as a full disk ends what pages out."""
    with file.open("wb") as opened:
        opened.write(weight.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return torch.from_file(str(file), size=weight.numel(), dtype=weight.dtype).reshape(weight.shape)
