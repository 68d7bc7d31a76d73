"""All that rankwise knows of PEFT's insides: variants and their tuner, the kinds of modules, sums of adapters."""

from rankwise.peft_bridge.saved import adapter_state, adapter_weights
from rankwise.peft_bridge.variant import (
    Kind,
    LowRankVariant,
    active_adapter,
    adapted_layers,
    base_modules,
    check_alphas,
    check_config,
    keep_state,
    matrix_factors,
    pattern_keys,
    register,
    target_modules,
    tuner_layers,
)

__all__ = [
    "Kind",
    "LowRankVariant",
    "active_adapter",
    "adapted_layers",
    "adapter_state",
    "adapter_weights",
    "base_modules",
    "check_alphas",
    "check_config",
    "keep_state",
    "matrix_factors",
    "pattern_keys",
    "register",
    "target_modules",
    "tuner_layers",
]
