"""What AdaLoRA cannot be trained with, told before the training begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import AdaLoraConfig
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers import TrainingArguments

from rankwise.errors import UserError
from rankwise.peft_bridge import active_adapter, check_config


def adalora_config(model: nn.Module) -> tuple[str, AdaLoraConfig]:
    """The active adapter's name and config.

    Raises:
        UserError: it is not AdaLoRA.
    """
    adapter = active_adapter(model)
    config = model.peft_config[adapter]  # type: ignore[index]
    if not isinstance(config, AdaLoraConfig):
        raise UserError(f"adapter {adapter!r} is of {type(config).__name__}: this is for peft.AdaLoraConfig")
    return adapter, config


def check_adapter(model: Any, adapter: str, layers: Mapping[str, LoraLayer]) -> None:
    """Refuse an adapter that PEFT's allocator could not take from its start to its end.

    Args:
        model: a PEFT model.
        adapter: name of its AdaLoRA adapter.
        layers: that hold it, by their names in the base model.

    Raises:
        UserError: it was loaded for inference, or was allocated before; a setting would be ignored, a name mistaken; or
            a convolution has several groups.
    """
    config: AdaLoraConfig = model.peft_config[adapter]
    if not hasattr(model.base_model, "rankallocator"):
        raise UserError(f"adapter {adapter!r} was loaded for inference: load it with is_trainable=True")
    size = sum(layer.lora_E[adapter].numel() for layer in layers.values())
    if config.rank_pattern is not None or size != model.base_model.rankallocator.init_bgt:
        raise UserError(
            f"adapter {adapter!r} has a rank_pattern: its ranks were allocated before, which AdaLoRA does once; make a "
            "new adapter, or train this one on without allocation, where its ranks stay"
        )
    check_config(config, starts=(True, False))
    for name in ("use_rslora", "alpha_pattern"):
        if getattr(config, name):
            raise UserError(f"AdaLoraConfig({name}={getattr(config, name)!r}) would be ignored: leave {name} out")
    # The allocator finds parameters by parts of their names, and splits the names at the adapter's.
    taken = [name for name in (*layers, *model.peft_config) if adapter in name and name != adapter]
    if taken:
        raise UserError(
            f"adapter name {adapter!r} is also a part of {taken[0]!r}, which PEFT's AdaLoRA would mistake for it: give "
            "the adapter another name, and adapt no module that modules_to_save copies"
        )
    for name, layer in layers.items():
        if getattr(layer.get_base_layer(), "groups", 1) > 1:
            raise UserError(f"{name}: AdaLoRA cannot adapt a convolution of several groups: leave it out")


def check_schedule(config: AdaLoraConfig, total: int) -> None:
    """Refuse a schedule that is not that of a training of ``total`` optimizer steps, or allocates nothing in it.

    Raises:
        UserError: it is not, or does not.
    """
    if config.total_step != total:
        raise UserError(
            f"AdaLoraConfig(total_step={config.total_step}) is not what training takes, which is {total} optimizer "
            f"steps, accumulated batches counted once: make the adapter with total_step={total}"
        )
    if config.tinit >= config.total_step - config.tfinal:
        raise UserError(
            f"AdaLoraConfig(tinit={config.tinit}, tfinal={config.tfinal}) leaves none of {total} steps to allocate "
            "ranks in: lower one of them"
        )
    if not 0 < config.target_r < config.init_r:
        raise UserError(
            f"AdaLoraConfig(target_r={config.target_r}, init_r={config.init_r}) leaves nothing to cut: target_r must "
            "be above 0 and below init_r"
        )


def check_arguments(args: TrainingArguments) -> None:
    """Refuse a way of training in which AdaLoRA cannot see whole gradients.

    Raises:
        UserError: DeepSpeed, FSDP, or reentrant gradient checkpointing in several processes.
    """
    for name in ("deepspeed", "fsdp"):
        if getattr(args, name, None):
            raise UserError(f"{name} keeps no whole gradients, which AdaLoRA's allocation needs: train without it")
    reentrant = (args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
    if args.gradient_checkpointing and reentrant and args.world_size > 1:
        raise UserError(
            "reentrant gradient checkpointing marks AdaLoRA's factors ready twice in several processes, since its "
            "orthogonality term uses them too: set gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
