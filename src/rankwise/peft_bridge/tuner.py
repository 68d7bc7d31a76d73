"""PEFT's LoRA tuner with our variants: every target is checked and wrapped, then given its first values."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Embedding, LoraLayer
from peft.tuners.lora.model import LoraModel
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn

from rankwise.errors import UserError, naming
from rankwise.peft_bridge import LowRankVariant, adapted_layers
from rankwise.peft_bridge.combining import add_combined
from rankwise.peft_bridge.targets import check_module, check_targets

logger = logging.getLogger(__name__)


class VariantEmbedding(Embedding):
    """PEFT's embedding layer, whose batches of mixed adapters ask the variants too."""

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        result: Tensor = self.base_layer(x, *args, **kwargs)
        for adapter in set(adapter_names) & set(self.lora_embedding_A.keys()):
            rows = [row for row, name in enumerate(adapter_names) if name == adapter]
            output = self.lora_variant[adapter].forward(self, adapter, x[rows], result[rows])
            result[rows] = output.to(result.dtype)
        return result


class VariantModel(LoraModel):
    """PEFT's LoRA tuner with one of our variants in every layer it makes."""

    targeted_module_names: list[str]

    def make_variant(self, config: LoraConfig) -> LowRankVariant:
        """The variant for this config."""
        raise NotImplementedError(f"{type(self).__name__} must say which variant it uses")

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's hook: wrap every target, then fill in the first values; where either fails, the model is as before.

        A second adapter of the very config object of another is made as its copy, trained values and all. Trainers of
        preferences add one so as the reference of the first, and copy those parameters alone whose names have the
        adapter's name between dots, which those of gates and embeddings have not.

        Raises:
            UserError: a target matches nothing, a module cannot be adapted, or its weight has no start.
        """
        check_targets(model, self.peft_config[adapter_name])
        modules = dict(model.named_modules())
        trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        targeted = [*self.targeted_module_names]
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._start(model, adapter_name)
        except BaseException as error:
            _undo(model, adapter_name, modules)
            self.targeted_module_names = targeted
            for parameter, required in trained:
                parameter.requires_grad_(required)
            if isinstance(error, NoMatchingPeftModuleError):
                raise UserError(str(error)) from error
            raise

    def _start(self, model: nn.Module, adapter: str) -> None:
        config, empty, count = self.peft_config[adapter], 0, 0
        layers = list(adapted_layers(model, adapter))
        for name, layer in layers:
            with naming(name):
                layer.lora_variant[adapter].check(layer, adapter, config)
        original = next((name for name, one in self.peft_config.items() if one is config and name != adapter), "")
        if original:
            warnings.warn(
                f"adapter {adapter!r} was given the config object of {original!r} itself and is made as its copy; for "
                "a start of its own give it a copy of the config",
                stacklevel=2,
            )
        for number, (name, layer) in enumerate(layers, start=1):
            with naming(name), torch.no_grad():
                copied = copy_adapter(layer, original, adapter)
                found = 0 if copied else layer.lora_variant[adapter].start(layer, adapter, config)
            empty, count = empty + found, count + (found > 0)
            if 10 * number // len(layers) > 10 * (number - 1) // len(layers):
                logger.info("adapter %s: %d of %d modules started", adapter, number, len(layers))
        if empty:
            warnings.warn(
                f"{empty} directions in {count} modules have a singular value that is zero to float32's rounding: "
                "there B0 is zero and A0 has the norm of LoRA's usual start",
                stacklevel=2,
            )

    def _create_and_replace(
        self,
        lora_config: LoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        check_module(target, current_key, lora_config)
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)
        layer = getattr(parent, target_name)
        check_module(layer, current_key, lora_config)
        variant = self.make_variant(lora_config)
        layer.lora_variant[adapter_name] = variant
        _keep_precision(layer, adapter_name)
        with naming(current_key), torch.no_grad():
            variant.attach(layer, adapter_name, lora_config)

    @staticmethod
    def _create_new_module(lora_config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        if isinstance(target, nn.Embedding):
            return VariantEmbedding(target, adapter_name, config=lora_config, **kwargs)
        made: nn.Module = LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)
        return made

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            for _, layer in adapted_layers(self.model, adapter_name):
                _narrow(layer, adapter_name)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for name, layer in self.model.named_modules():
            if type(layer).__name__ == "TorchaoLoraLinear" and layer.lora_variant:
                raise UserError(
                    f"{name}: PEFT would merge B A alone into a torchao weight; use rankwise.export instead"
                )

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        **others: Any,
    ) -> None:
        """Add an adapter of the same kind whose update is ``sum_i weights_i update_i``: see ``combining.py``.

        Args:
            adapters: names of adapters of this model.
            weights: one for each, of any sign.
            adapter_name: of the new adapter.
            combination_type: ``cat`` (the sum exactly) or ``svd`` (its best approximation of rank ``svd_rank``).
            svd_rank: by default the largest rank of the adapters.
            others: PEFT's other options, none of which is available.

        Raises:
            UserError: another type or option, an unknown adapter, or a name that is taken.
        """
        given = sorted(name for name, value in others.items() if value is not None)
        if given:
            raise UserError(f"add_weighted_adapter({given[0]}={others[given[0]]!r}) is not available: leave it out")
        add_combined(self, adapters, weights, adapter_name, combination_type, svd_rank)


def copy_adapter(layer: LoraLayer, original: str, adapter: str) -> bool:
    """Give ``adapter`` all values that another adapter has in the layer; False where there are none that fit.

    Args:
        layer: with the new adapter.
        original: name of the other one.
        adapter: name of the new one.
    """
    if original not in layer.r or not math.isclose(layer.scaling[original], layer.scaling[adapter]):
        return False
    old, new = _values(layer, original), _values(layer, adapter)
    same = old.keys() == new.keys() and all(value.shape == new[name].shape for name, value in old.items())
    if not same or any(value.is_meta for value in (*old.values(), *new.values())):
        return False
    for name, value in old.items():
        new[name].copy_(value)
    return True


def _values(layer: LoraLayer, adapter: str) -> dict[str, Tensor]:
    """All tensors of an adapter in a layer, trained and frozen, by names that are the same for each adapter."""
    found: dict[str, Tensor] = {}
    for part in layer.adapter_layer_names:
        state = getattr(layer, part)[adapter] if adapter in getattr(layer, part) else None
        if isinstance(state, nn.Module):
            found |= {f"{part}.{name}": value for name, value in state.state_dict().items()}
        elif state is not None:
            found[part] = state.data
    return found


def _undo(model: nn.Module, adapter: str, modules: Mapping[str, nn.Module]) -> None:
    """Put the modules back that an adapter replaced, and take it out of those that had others before."""
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if name and modules[parent]._modules[child] is not module:
            setattr(modules[parent], child, module)
    for _, layer in adapted_layers(model, adapter):
        layer.delete_adapter(adapter)


def _keep_precision(layer: LoraLayer, adapter: str) -> None:
    """Hold the adapter in float32 at least, also where PEFT moves it to the device and dtype of a bfloat16 base.

    A and B differ little from their start: rounded to bfloat16 they would lose what they learnt.
    """
    for holder in _holders(layer):
        if adapter in holder:
            holder[adapter] = _cast(holder[adapter], torch.promote_types(_dtype(holder[adapter]), torch.float32))
    layer._get_base_layer_device_and_dtype = _device_and_wide_dtype


def _holders(layer: LoraLayer) -> tuple[Any, ...]:
    return layer.lora_A, layer.lora_B, layer.lora_embedding_A, layer.lora_embedding_B, layer.lora_magnitude_vector


def _cast(state: nn.Module | nn.Parameter, dtype: torch.dtype) -> nn.Module | nn.Parameter:
    """A module of one parameter, or a parameter, in another dtype."""
    if isinstance(state, nn.Module):
        return state.to(dtype)
    return nn.Parameter(state.detach().to(dtype), requires_grad=state.requires_grad)


def _dtype(state: nn.Module | nn.Parameter) -> torch.dtype:
    return next(state.parameters()).dtype if isinstance(state, nn.Module) else state.dtype


def _device_and_wide_dtype(base: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    """What PEFT moves an adapter to: the base layer's device, and its dtype where that is float32 or wider."""
    device, dtype = LoraLayer._get_base_layer_device_and_dtype(None, base)
    return device, dtype if dtype in (torch.float32, torch.float64) else None


def _narrow(layer: LoraLayer, adapter: str) -> None:
    """Give what is trained the base layer's dtype, as ``autocast_adapter_dtype=False`` asks."""
    _, dtype = LoraLayer._get_base_layer_device_and_dtype(None, layer.get_base_layer())
    if dtype is None or not dtype.is_floating_point:
        return
    for holder in _holders(layer):
        if adapter in holder:
            holder[adapter] = _cast(holder[adapter], dtype)
