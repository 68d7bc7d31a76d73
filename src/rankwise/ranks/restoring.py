"""A live adapter takes the ranks of a saved one, so that the saved values can be loaded into it."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel, PeftType

from rankwise.errors import UserError
from rankwise.models import loading
from rankwise.peft_bridge import Kind, active_adapter, adapted_layers, adapter_state, adapter_weights
from rankwise.ranks.resizing import remove_from_layer
from rankwise.reading import open_tensors


def match_ranks(model: PeftModel, folder: Path) -> None:
    """Make the active adapter anew where the one in a folder has other ranks, or other layers.

    Its config is then the saved one, its layers are those that the saved one has, and its values are waiting to be
    loaded: by ``peft.set_peft_model_state_dict``, say. Where the tensors have the same shapes nothing is done. For LoRA
    and SoRA; the ranks of MiLoRA do not change, and AdaLoRA's are matched by PEFT while it loads. An optimizer does not
    go on with the new parameters.

    Args:
        model: with an active adapter of the same kind.
        folder: that ``save_pretrained`` wrote.

    Raises:
        UserError: the saved adapter cannot be read, is of another kind, or does not fit the model.
    """
    adapter = active_adapter(model)
    live: LoraConfig = model.peft_config[adapter]
    if live.peft_type not in (PeftType.LORA, Kind.SORA):
        return
    saved = _saved_shapes(folder)
    if _live_shapes(model, adapter) == saved:
        return
    with loading(f"the config in {folder}", "save the adapter again"):
        config = PeftConfig.from_pretrained(folder)
    if config.peft_type != live.peft_type:
        raise UserError(
            f"{folder} holds an adapter of {type(config).__name__}, and the model's is {type(live).__name__}"
        )
    _replace(model, adapter, config)
    if unlike := sorted(name for name, _ in _live_shapes(model, adapter).items() ^ saved.items()):
        raise UserError(f"{folder} does not fit the model: {unlike[0]} has another shape, or is not in both")


def _replace(model: PeftModel, adapter: str, config: LoraConfig) -> None:
    """Take the adapter out of its layers, and put it into those of another config by PEFT's own way of adding one."""
    for name, _ in list(adapted_layers(model, adapter)):
        remove_from_layer(model, name, adapter)
    start, config.init_lora_weights, config.inference_mode = config.init_lora_weights, False, False
    model.peft_config[adapter] = config
    model.base_model.inject_adapter(model.get_base_model(), adapter)
    model.base_model._cast_adapter_dtype(adapter)
    model.set_adapter(adapter)
    config.init_lora_weights = start


def _saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    with open_tensors(adapter_weights(folder), "save the adapter again") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys() if ".lora_" in key}


def _live_shapes(model: PeftModel, adapter: str) -> dict[str, tuple[int, ...]]:
    state = adapter_state(model, adapter)
    return {key: tuple(value.shape) for key, value in state.items() if ".lora_" in key}
