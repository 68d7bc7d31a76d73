"""A saved MiLoRA adapter on a model, in one step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from rankwise.directions.checkpoint import WRITE_AGAIN
from rankwise.directions.milora import MiloraConfig
from rankwise.errors import UserError
from rankwise.files import check_folder
from rankwise.models import loading
from rankwise.peft_bridge import adapter_weights

DOWNLOAD = ("subfolder", "revision", "token", "cache_dir")


def load_checkpoint(
    model: nn.Module, folder: str | Path, adapter: str = "default", *, is_trainable: bool = False, **options: Any
) -> PeftModel:
    """Put a MiLoRA checkpoint on a model: A, A0, B and B0 to the bit, nothing decomposed, the base weights compared.

    On a model without adapters this is ``PeftModel.from_pretrained`` with the config of
    ``MiloraConfig.from_pretrained``; a model that has MiLoRA adapters gets one more, which ``set_adapter`` makes the
    active one.

    Args:
        model: the base, or a ``PeftModel`` of MiLoRA.
        folder: what ``save_pretrained``, a trainer or :func:`rankwise.directions.initialise` wrote, or its repository
            on the Hugging Face Hub.
        adapter: its name on the model.
        is_trainable: whether it is to be trained further.
        options: as ``PeftModel.load_adapter`` takes them (``low_cpu_mem_usage``, ``subfolder``, ``token``).

    Returns:
        The model with the adapter; ``model`` itself where that is a ``PeftModel``.

    Raises:
        UserError: no checkpoint of MiLoRA in safetensors, a damaged one, a base weight that is not the one it was begun
            on, tensors that do not fit, a name that is taken, or a model with adapters of another kind.
    """
    place = {name: options[name] for name in DOWNLOAD if name in options}
    if Path(folder).is_dir():
        check_folder(Path(folder, place.get("subfolder") or ""))
    config = MiloraConfig.from_pretrained(folder, **place)
    adapter_weights(folder, **place)
    if not isinstance(model, PeftModel):
        with loading(f"{folder}", WRITE_AGAIN):
            return PeftModel.from_pretrained(
                model, folder, adapter, config=config, is_trainable=is_trainable, **options
            )
    if adapter in model.peft_config:
        raise UserError(f"adapter {adapter!r} exists already: choose another name, or delete_adapter it first")
    if model.peft_type != config.peft_type:
        raise UserError(
            f"the model's adapters are of kind {getattr(model.peft_type, 'value', model.peft_type)}, and PEFT combines "
            "one kind alone: load this one as plain LoRA with model.load_adapter, or onto the base"
        )
    config.inference_mode = not is_trainable
    kept = {name: options[name] for name in ("low_cpu_mem_usage", "autocast_adapter_dtype") if name in options}
    with loading(f"{folder}", WRITE_AGAIN):
        model.add_adapter(adapter, config, **kept)
    try:
        with loading(f"{folder}", WRITE_AGAIN):
            model.load_adapter(folder, adapter, is_trainable=is_trainable, **options)
    except BaseException:
        model.delete_adapter(adapter)
        raise
    if is_trainable:
        model.set_requires_grad(adapter)
    return model
