"""Write low-rank factors as a plain LoRA in PEFT's own form, with scaling 1 everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from rankwise.files import new_folder
from rankwise.low_rank import Factors
from rankwise.peft_bridge import adapted_layers, adapter_state, base_modules, pattern_keys, target_modules
from rankwise.peft_bridge.matrices import in_embedding

EXPORT = "export"  # in the manifests of what is written here


def write_plain_lora(model: PeftModel, adapter: str, factors: Mapping[str, Factors], folder: Path) -> None:
    """Write a folder that PEFT loads on the untouched base: config and tensors, replaced in one step.

    Args:
        model: with the trained adapter, whose trained heads and biases are written too.
        adapter: its name.
        factors: (b, a) of each layer's update by the layer's name in the base model, the scaling in b.
        folder: new, or an earlier one.
    """
    layers = dict(adapted_layers(model, adapter))
    tensors = _other_tensors(model, adapter)
    for name, (b, a) in factors.items():
        tensors |= _named(f"base_model.model.{name}", layers[name], adapter, b, a)
    with new_folder(folder, EXPORT) as made:
        _config(model, adapter, factors).save_pretrained(made)
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            made / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )


def _named(prefix: str, layer: LoraLayer, adapter: str, b: Tensor, a: Tensor) -> dict[str, Tensor]:
    """The two tensors of a layer as PEFT names and shapes them."""
    if in_embedding(layer, adapter):
        return {f"{prefix}.lora_embedding_A": a, f"{prefix}.lora_embedding_B": b}
    base = layer.get_base_layer()
    if isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d):  # A is a convolution of its kernel, B one of 1 x 1
        kernel = base.weight.shape[2:]
        a, b = a.reshape(len(a), -1, *kernel), b.reshape(*b.shape, *[1] * len(kernel))
    return {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}


def _other_tensors(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """What was trained beside the low-rank factors: whole modules (a classifier's head) and biases."""
    state = adapter_state(model, adapter)
    return {name: tensor.clone() for name, tensor in state.items() if ".lora_" not in name}


def _config(model: PeftModel, adapter: str, factors: Mapping[str, Factors]) -> LoraConfig:
    """A plain LoRA config with scaling 1 everywhere."""
    trained: LoraConfig = model.peft_config[adapter]
    ranks = {name: b.shape[1] for name, (b, _) in factors.items()}
    largest = max(ranks.values())
    keys = pattern_keys(model, ranks)
    uneven = {keys[name]: rank for name, rank in ranks.items() if rank != largest}
    return LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=uneven,
        alpha_pattern=dict(uneven),
        target_modules=_target_modules(model, set(factors)),
        task_type=trained.task_type,
        modules_to_save=trained.modules_to_save,
        trainable_token_indices=trained.trainable_token_indices,
        layer_replication=trained.layer_replication,
        fan_in_fan_out=trained.fan_in_fan_out,
        bias=trained.bias,
        base_model_name_or_path=trained.base_model_name_or_path,
        inference_mode=True,
    )


def _target_modules(model: PeftModel, names: set[str]) -> list[str] | str:
    """The modules' last names where these mean just these modules, else their full names."""
    short = {name.rpartition(".")[2] for name in names}
    meant = {name for name, _ in base_modules(model) if name.rpartition(".")[2] in short}
    found = short if meant == names else target_modules(model, names)
    return found if isinstance(found, str) else sorted(found)
