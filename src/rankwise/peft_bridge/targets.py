"""Which modules an adapter is for: each that is named must be there, and have an update of matrices."""

from __future__ import annotations

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from rankwise.errors import UserError, nearest
from rankwise.peft_bridge import base_modules
from rankwise.peft_bridge.matrices import refusal


def check_module(module: nn.Module, name: str, config: LoraConfig) -> None:
    """Refuse a module that has no update of matrices, by name and with the reason.

    Raises:
        UserError: the module cannot be adapted, or not with DoRA.
    """
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    reason = refusal(module)
    if reason is None and config.use_dora and isinstance(base, nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        reason = "use_dora is for Linear and Conv1D"
    if reason is not None:
        raise UserError(
            f"{type(config).__name__} cannot adapt {name} ({type(base).__name__}): {reason}; leave the module out of "
            "target_modules"
        )


def check_targets(model: nn.Module, config: LoraConfig) -> None:
    """Refuse a list of ``target_modules`` of which an entry matches no module, in an adapter that is made anew.

    A saved adapter is loaded for what it adapts: by now its list can change nothing.

    Raises:
        UserError: such an entry, with the module of the nearest name.
    """
    from_checkpoint = config.init_lora_weights is False and getattr(config, "base_hashes", {})
    loaded = config.inference_mode or from_checkpoint
    if loaded or config.target_modules is None or isinstance(config.target_modules, str):
        return
    names = [name for name, _ in base_modules(model) if name]
    for entry in sorted(config.target_modules):
        if not any(f".{name}".endswith(f".{entry}") for name in names):
            parts = entry.count(".") + 1
            ends = {".".join(name.split(".")[-parts:]) for name in names}
            known = {end for end in ends if not end.isdigit()} or ends
            raise UserError(f"target_modules {entry!r} matches no module of the model: {nearest(entry, known)}")
