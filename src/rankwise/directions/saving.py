"""PEFT's hooks for saving and loading: MiLoRA's checkpoints, and the check that the base is the right one."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import Tensor, nn

from rankwise.directions.basehash import base_hashes, check_base, module_hashes
from rankwise.directions.checkpoint import (
    SIDE_FILE,
    WRITE_AGAIN,
    Pair,
    plain_config,
    read_side,
    split_state,
    stack_state,
    start_distance,
    start_ratio,
    write_side,
)
from rankwise.directions.variants import START, find_twin
from rankwise.errors import UserError, cut
from rankwise.peft_bridge import adapted_layers
from rankwise.peft_bridge.matrices import factor_parameters
from rankwise.peft_bridge.tuner import VariantModel
from rankwise.reading import first_line

# Two computations of one start on one base differ by their solvers' rounding, far below this.
SAME_START = 1e-2


class CheckpointedConfig(LoraConfig):
    """A config that saves itself as plain LoRA of rank 2r, with ``milora.json`` beside it."""

    base_hashes: dict[str, str]  # of the base weights, by module: as read from a checkpoint, or as last saved

    def __post_init__(self) -> None:
        """As PEFT's own."""
        super().__post_init__()
        self.base_hashes = {}

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write ``adapter_config.json``, a plain LoRA config of rank 2r, and ``milora.json``."""
        plain_config(self).save_pretrained(str(save_directory), **kwargs)
        write_side(Path(save_directory), self, self.base_hashes)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> CheckpointedConfig:
        """The config of a checkpoint, for ``PeftModel.from_pretrained(base, folder, config=..., is_trainable=True)``.

        With it nothing is decomposed (``init_lora_weights=False``): factors and start come from the checkpoint, and the
        base weights are compared with those that the adapter was begun on. ``get_peft_model`` with it alone makes an
        adapter without values; ``rankwise.directions.load_checkpoint`` does both steps. A config that was saved by
        itself, with no weights beside it, comes back as it was and computes its start.

        Args:
            pretrained_model_name_or_path: the checkpoint's folder, or its repository on the Hugging Face Hub.
            subfolder: where the adapter lies within it.
            kwargs: passed on to ``huggingface_hub.hf_hub_download`` (``revision``, ``token``).

        Raises:
            UserError: there is no ``milora.json``, it is damaged, or it is of another format.
        """
        folder = Path(pretrained_model_name_or_path)
        settings, base = read_side(folder, subfolder, **kwargs)
        path = folder / (subfolder or "") / SIDE_FILE
        if unknown := settings.keys() - {field.name for field in dataclasses.fields(cls)}:
            raise UserError(
                f"{path} has settings not known here ({cut(', '.join(sorted(unknown)), 300)}): update rankwise"
            )
        start = {"init_lora_weights": False} if base or not _is_config_alone(path.parent) else {}
        try:
            config = cls(**settings | start | {"inference_mode": False})
        except (TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({first_line(error)}): {WRITE_AGAIN}") from error
        config.base_hashes = base
        return config


class CheckpointedModel(VariantModel):
    """A tuner whose adapters keep a frozen start: they are saved as plain LoRA, and know the base they stand on."""

    def _prepare_model(self, peft_config: CheckpointedConfig, model: nn.Module) -> None:
        """PEFT's hook before any module is replaced: compare the base with that of the checkpoint."""
        super()._prepare_model(peft_config, model)
        self._known: dict[str, str] = {}
        if not computes_start(peft_config) and peft_config.base_hashes:
            self._known = base_hashes(model, peft_config.base_hashes)
            check_base(peft_config.base_hashes, self._known)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's hook: adapt the modules, and remember the hash of each base weight."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        layers = dict(adapted_layers(model, adapter_name))
        unknown = {name: layer.get_base_layer() for name, layer in layers.items() if name not in self._known}
        hashes = self._known | module_hashes(unknown)
        for name in layers.keys() & hashes.keys():
            layers[name].base_hashes = getattr(layers[name], "base_hashes", {}) | {adapter_name: hashes[name]}
        self._known = {}
        config = self.peft_config[adapter_name]
        for layer in layers.values():
            empty = not computes_start(config) and find_twin(layer, adapter_name, config) is None
            mark_empty(layer, adapter_name, empty)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: CheckpointedConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """PEFT's hook: what is saved, as plain LoRA; the config is saved next and takes the base's hashes with it."""
        config.base_hashes = live_hashes(model, adapter_name)
        warn_of_empty(model, adapter_name)
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return stack_state(found, adapter_name, START)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: CheckpointedConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's hook: a checkpoint's tensors under the model's names."""
        live = {name: live_pair(layer, adapter_name) for name, layer in adapted_layers(model, adapter_name)}
        shapes = {name: (pair.A.shape, pair.B.shape) for name, pair in live.items()}
        found = split_state(state_dict, shapes, START)
        if computes_start(config):
            check_start(live, found)
        for _, layer in adapted_layers(model, adapter_name):
            mark_empty(layer, adapter_name, False)
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, found)
        return remapped

    @classmethod
    def _convert_state_dict_for_initial_model(cls, *_: Any, **__: Any) -> NoReturn:
        """PEFT's hook for starts that change the base: refused, since there is nothing to convert."""
        raise UserError(
            "save_pretrained(path_initial_model_for_weight_conversion=...) is not needed: what is saved is plain LoRA "
            "on the original base already; leave it out"
        )


def _is_config_alone(folder: Path) -> bool:
    """Whether a local folder has no adapter's weights."""
    return folder.is_dir() and not any((folder / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))


def computes_start(config: LoraConfig) -> bool:
    """Whether an adapter of this config computes its start, rather than taking it from a checkpoint."""
    return config.init_lora_weights is not False


def live_hashes(model: nn.Module, adapter: str) -> dict[str, str]:
    """Hashes of the base weights under ``adapter``, as they were when it was attached."""
    known = {name: getattr(layer, "base_hashes", {}).get(adapter) for name, layer in adapted_layers(model, adapter)}
    return {name: value for name, value in known.items() if value}


def live_pair(layer: LoraLayer, adapter: str) -> Pair:
    """The factors of a layer and their start, as they are in memory."""
    start = getattr(layer, START)[adapter]
    a, b = factor_parameters(layer, adapter)
    return Pair(a.detach(), b.detach(), start.A.reshape(a.shape), start.B.reshape(b.shape))


def mark_empty(layer: LoraLayer, adapter: str, empty: bool) -> None:
    """Note whether an adapter's values in a layer are still to come from a file."""
    layer.empty_adapters = getattr(layer, "empty_adapters", frozenset()) - {adapter} | ({adapter} if empty else set())


def warn_of_empty(model: nn.Module, adapter: str) -> None:
    """Warn where an adapter is saved that computed no start and was given none."""
    layers = [layer for _, layer in adapted_layers(model, adapter) if adapter in getattr(layer, "empty_adapters", ())]
    starts = [getattr(layer, START)[adapter].A for layer in layers]
    if any(not start.is_meta and start.any() for start in starts):  # the start of a weighted sum is zero
        warnings.warn(
            f"adapter {adapter!r} was made with init_lora_weights=False and no checkpoint was loaded into it, so that "
            "it began with random values: use rankwise.directions.load_checkpoint, or leave init_lora_weights out",
            stacklevel=2,
        )


def check_start(live: Mapping[str, Pair], state: Mapping[str, Tensor]) -> None:
    """Compare the start that was computed here with that of a checkpoint, where its config was not read.

    A start that is not the same to the bit is counted in a warning: the checkpoint's is used.

    Raises:
        UserError: their products differ by more than solvers do.
    """
    others = 0
    for prefix in [key.removesuffix(".A") for key in state if key.endswith(f".{START}.A")]:
        name = prefix.removesuffix(f".{START}").removeprefix("base_model.model.")
        pair, a0, b0 = live[name], state[f"{prefix}.A"], state[f"{prefix}.B"]
        if not pair.A0.is_meta and not (_same_bits(a0, pair.A0) and _same_bits(b0, pair.B0)):
            _check_near(name, pair._replace(A=a0.to(pair.A0.device), B=b0.to(pair.B0.device)))
            others += 1
    if others:
        warnings.warn(
            f"{others} of {len(live)} starts of the checkpoint are not to the bit the ones computed here: it was made "
            "on another machine or with other threads, or the base changed outside this part of its spectrum; the "
            "checkpoint's are used. MiloraConfig.from_pretrained compares the base weights themselves",
            stacklevel=2,
        )


def _same_bits(saved: Tensor, own: Tensor) -> bool:
    return torch.equal(saved.to(own.device), own.to(saved.dtype))


def _check_near(name: str, pair: Pair) -> None:
    """Refuse a start B A that is another than B0 A0, and tell a mere factor from another part or base."""
    far, ratio = start_distance(pair), start_ratio(pair)
    if far <= SAME_START:
        return
    if start_distance(pair._replace(B0=ratio * pair.B0)) <= SAME_START:
        raise UserError(
            f"{name}: the checkpoint's start is {ratio:.4g} times the one computed here, as with another lora_alpha or "
            "use_rslora, or on a base so many times larger: take the settings that it was begun with, which "
            "MiloraConfig.from_pretrained reads, and the base that it was begun on"
        )
    raise UserError(
        f"{name}: the checkpoint was begun on another base, or from another part of its spectrum (its start differs by "
        f"{far:.1%}): load the model that it was begun on, or take the config from MiloraConfig.from_pretrained, which "
        "compares the base weights themselves"
    )
