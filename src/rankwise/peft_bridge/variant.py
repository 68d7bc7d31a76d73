"""How an adapter computes its update, how PEFT is told of it, and where it lies in a model.

A method is a :class:`LowRankVariant` (how an adapter computes its update) and a config. :func:`register` makes the
config known to PEFT under a name of its own, so that ``get_peft_model``, saving and loading take their usual way.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Iterator
from enum import Enum
from numbers import Integral, Real
from typing import ClassVar

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftConfig, PeftModel
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora.layer import LoraLayer, LoraVariant, MultiheadAttention, ParamWrapper
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from rankwise.errors import UserError
from rankwise.peft_bridge.matrices import as_weight, factor_matrices, refusal, set_factors, svd_factors


class Kind(str, Enum):  # noqa: UP042 - PEFT reads the name of a kind from str(), as its own PeftType gives it
    """Our methods, as PEFT's ``peft_type`` names them."""

    MILORA = "MILORA"
    SORA = "SORA"
    BOTTLENECK = "BOTTLENECK"


class LowRankVariant(LoraVariant):
    """An update ``scaling * B' A'`` of low rank whose factors follow from what is trained.

    A subclass says what it keeps in a layer (:meth:`attach`), its first values (:meth:`start`), what its factors are
    (:meth:`factors`) and how it adds the update to a layer's output (``forward``, PEFT's hook). Merging and export
    follow from the factors. ``matrices.py`` says what they are for each kind of module.
    """

    is_low_rank: ClassVar[bool] = True

    def attach(self, layer: LoraLayer, adapter: str, config: LoraConfig) -> None:
        """Make this variant's own parameters and buffers in ``layer``; on the meta device, only their shapes."""
        raise NotImplementedError(f"{type(self).__name__} must say what it keeps in a layer")

    def check(self, layer: LoraLayer, adapter: str, config: LoraConfig) -> None:
        """Refuse what :meth:`start` could not fill; every module is asked before the first one is filled.

        Raises:
            UserError: the layer has no such start.
        """

    def start(self, layer: LoraLayer, adapter: str, config: LoraConfig) -> int:
        """Fill in the first values, once every module was found to be fit; returns how many directions had none."""
        return 0

    def factors(self, layer: LoraLayer, adapter: str) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]:
        """B' and A', whose product times the layer's scaling is the update."""
        raise NotImplementedError(f"{type(self).__name__} must give its factors")

    def set_update(self, layer: LoraLayer, adapter: str, b: Float[Tensor, "out k"], a: Float[Tensor, "k in"]) -> None:
        """Make ``scaling * b a`` the update of an adapter of rank k that was not trained yet."""
        set_factors(layer, adapter, b, a)

    def supports_lora_conversion(self) -> bool:
        """PEFT's hook: its own conversion would take B A for the update; ``rankwise.export`` converts."""
        return False

    def delta(self, layer: LoraLayer, adapter: str) -> Tensor:
        """The update in the layout of the base weight, computed in float32 at least."""
        b, a = (factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in self.factors(layer, adapter))
        update: Tensor = as_weight(layer, b @ a) * layer.scaling[adapter]
        return update

    def merge_safe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """PEFT's hook: the merged weight as a new tensor."""
        return (orig_weight + self.delta(module, active_adapter).to(orig_weight.device)).to(orig_weight.dtype)

    def merge_unsafe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        """PEFT's hook: merge into the weight's storage, which is looked up last: computing may replace it."""
        merged = self.merge_safe(module, active_adapter, orig_weight.data)
        orig_weight.data.copy_(merged)

    def unmerge(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """PEFT's hook: the weight without the update."""
        delta = self.delta(module, active_adapter).to(orig_weight.device)
        return (orig_weight.data - delta).to(orig_weight.dtype)


def keep_state(layer: LoraLayer, name: str, adapter: str, state: nn.Module | nn.Parameter) -> None:
    """Put ``state`` into the layer as ``name``, so that PEFT saves, moves, enables and deletes it with A and B."""
    if not hasattr(layer, name):
        setattr(layer, name, nn.ParameterDict() if isinstance(state, nn.Parameter) else nn.ModuleDict())
        layer.adapter_layer_names = (*layer.adapter_layer_names, name)
    getattr(layer, name)[adapter] = state


def check_config(
    config: LoraConfig, allowed: Collection[str] = (), starts: Collection[bool | str] = (True, False, "gaussian")
) -> None:
    """Refuse a setting of ``LoraConfig`` that would be ignored here or would change the base weights.

    Args:
        config: as the user gave it.
        allowed: names of variants that are available here.
        starts: what ``init_lora_weights`` may be.

    Raises:
        UserError: a setting of another LoRA variant, ``lora_bias``, an ``init_lora_weights`` of another method, or a
            rank that is none.
    """
    kind = type(config).__name__
    variants = [field.name for field in dataclasses.fields(config) if field.metadata.get("is_lora_variant")]
    for name in (*variants, "use_qalora", "lora_bias", "target_parameters"):
        if getattr(config, name) and name not in allowed:
            raise UserError(f"{kind}({name}={getattr(config, name)!r}) is not available: leave {name} out")
    if config.init_lora_weights not in starts:
        raise UserError(f"{kind}(init_lora_weights={config.init_lora_weights!r}) is not available: leave it out")
    for name, rank in {"r": config.r, **_items(config, "rank_pattern")}.items():
        if isinstance(rank, bool) or not isinstance(rank, Integral) or rank < 1:
            raise UserError(f"{kind}({name}={rank!r}) is not possible: it must be a whole number, 1 or more")


def check_alphas(config: LoraConfig) -> None:
    """Refuse an alpha, in ``lora_alpha`` or ``alpha_pattern``, by which an update could not be scaled.

    Raises:
        UserError: one that is no finite number above 0.
    """
    for name, alpha in {"lora_alpha": config.lora_alpha, **_items(config, "alpha_pattern")}.items():
        if isinstance(alpha, bool) or not isinstance(alpha, Real) or not 0 < float(alpha) < math.inf:
            raise UserError(
                f"{type(config).__name__}({name}={alpha!r}) is not possible: it must be above 0, a finite number"
            )


def _items(config: LoraConfig, pattern: str) -> dict[str, object]:
    """The entries of a pattern of the config, each by the name that a message gives it."""
    return {f"{pattern}[{key!r}]": value for key, value in (getattr(config, pattern) or {}).items()}


def register(kind: Kind, config: type[PeftConfig], tuner: type[BaseTuner]) -> None:
    """Make a method known to PEFT under ``kind``, the ``peft_type`` of its configs."""
    PEFT_TYPE_TO_CONFIG_MAPPING[kind] = config
    PEFT_TYPE_TO_TUNER_MAPPING[kind] = tuner
    PEFT_TYPE_TO_PREFIX_MAPPING[kind] = tuner.prefix


def active_adapter(model: nn.Module) -> str:
    """The one active adapter of a PEFT model.

    Raises:
        UserError: ``model`` is no PEFT model, or several adapters are active.
    """
    if not isinstance(model, PeftModel) and getattr(model, "peft_config", None):
        kind = type(model).__name__
        raise UserError(
            f"the adapter of this {kind} was added by its own add_adapter or load_adapter, which keep it inside the "
            "model: make it with peft.get_peft_model(base, config), or load it with peft.PeftModel.from_pretrained"
        )
    if not isinstance(model, PeftModel):
        raise UserError(f"a model with an adapter is needed, not {type(model).__name__}: use peft.get_peft_model first")
    active = model.active_adapters if hasattr(model, "active_adapters") else [model.active_adapter]
    names = [active] if isinstance(active, str) else list(active)
    if len(names) != 1:
        raise UserError(f"one active adapter is needed, not {len(names)} ({', '.join(names)}): use model.set_adapter")
    return names[0]


def adapted_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, LoraLayer]]:
    """Each layer that holds ``adapter``, with its name in the base model."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    for name, layer in base.named_modules():
        if isinstance(layer, LoraLayer) and adapter in layer.r:
            yield name, layer


def tuner_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, BaseTunerLayer]]:
    """Each layer that holds ``adapter``, of whatever method, with its name in the base model."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    for name, layer in base.named_modules():
        if isinstance(layer, BaseTunerLayer) and any(adapter in getattr(layer, at) for at in layer.adapter_layer_names):
            yield name, layer


def target_modules(model: nn.Module, names: Collection[str]) -> set[str] | str:
    """What PEFT's ``target_modules`` must be to mean just the modules of these full names."""
    ends = tuple(f".{name}" for name in names)
    others = {name for name, _ in base_modules(model) if name not in names}
    if any(name.endswith(ends) for name in others):
        return "|".join(re.escape(name) for name in sorted(names))
    return set(names)


def pattern_keys(model: nn.Module, names: Collection[str]) -> dict[str, str]:
    """What to call modules in PEFT's patterns of rank and alpha, where a name also means all that ends in it."""
    modules = [name for name, _ in base_modules(model)]
    return {name: f"^{name}" if any(m.endswith(f".{name}") for m in modules) else name for name in names}


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the base model as it was before it had adapters."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    inside: tuple[str, ...] = ()
    for name, module in base.named_modules():
        if not name.startswith(inside):
            yield name, module
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, f"{name}.")


def matrix_factors(layer: LoraLayer, adapter: str, name: str) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]:
    """B' and A' of any trained LoRA layer in the matrix view of ``matrices.py``, without its scaling.

    Raises:
        UserError: the layer's update is not of low rank (DoRA's magnitude, say).
    """
    variant = layer.lora_variant.get(adapter)
    if isinstance(variant, LowRankVariant) and variant.is_low_rank:
        return variant.factors(layer, adapter)
    if variant is not None:
        raise UserError(
            f"{name}: an update of {type(variant).__name__} is no product of two small matrices; merge it instead"
        )
    if isinstance(layer, AdaLoraLayer):
        if reason := refusal(layer.get_base_layer()):
            raise UserError(f"{name}: {reason}: leave the module out of target_modules")
        return svd_factors(layer, adapter)
    if isinstance(layer, MultiheadAttention | ParamWrapper):
        raise UserError(f"{name}: an adapter of {type(layer).__name__} has no plain LoRA form; merge it instead")
    if layer.lora_bias.get(adapter):
        raise UserError(f"{name}: an adapter with lora_bias has no plain LoRA form; merge it instead")
    b, a = factor_matrices(layer, adapter)
    return b.detach(), a.detach()
