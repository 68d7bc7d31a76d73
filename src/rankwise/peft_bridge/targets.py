"""Which modules an adapter is for: each that is named must be there, and have an update of matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rankwise.errors import UserError, nearest
from rankwise.peft_bridge import base_modules
from rankwise.peft_bridge.matrices import refusal

ALWAYS = 1024  # ranks and widths that no model is too small for: some methods take more than its matrices have


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


def check_sizes(model: nn.Module, settings: Mapping[str, Any], where: str = "") -> None:
    """Refuse sizes in a recipe's adapter or a config of PEFT's far beyond the model's, before anything is made of them.

    Raises:
        UserError: there is such a size; ``where`` is told before its name.
    """
    pattern = settings.get("rank_pattern")
    sizes = {name: settings.get(name) for name in ("r", "init_r", "initial_rank", "size")}
    sizes |= {f"rank_pattern.{name}": rank for name, rank in (pattern if isinstance(pattern, dict) else {}).items()}
    check = check_width if "VERA" in (settings.get("peft_type"), str(settings.get("kind")).upper()) else check_rank
    for name, size in sizes.items():
        if isinstance(size, int):
            check(model, size, f"{where}{name}")


def check_rank(model: nn.Module, rank: int, name: str) -> None:
    """Refuse a rank, or a width, far beyond those of a model's matrices, before anything of that size is made.

    Raises:
        UserError: it is above :data:`ALWAYS` and twice the smaller side of each of them, which MiLoRA's plain form may
            have; ``name`` is the setting's.
    """
    most = max(min(_shape(module)) for _, module in base_modules(model))
    if rank > max(ALWAYS, 2 * most):
        raise UserError(f"{name} {rank} is far more than the matrices of the model have: give {most} or less")


def check_width(model: nn.Module, width: int, name: str) -> None:
    """Refuse a large width of matrices that are shared by all modules, if one would be larger than all of a model.

    Raises:
        UserError: it is above :data:`ALWAYS` and such a width; ``name`` is the setting's.
    """
    whole = sum(math.prod(_shape(module)) for _, module in base_modules(model))
    most = max(ALWAYS, whole // max(1, *(max(_shape(module)) for _, module in base_modules(model))))
    if width > most:
        raise UserError(f"{name} {width} would make matrices larger than the whole model: give {most} or less")


def _shape(module: nn.Module) -> tuple[int, int]:
    """Of a module's matrix, also where its weight is packed or spread over processes; (0, 0) where it has none."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        return 0, 0
    return len(weight), math.prod(weight.shape[1:])
