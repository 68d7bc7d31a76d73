"""PEFT's hooks for saving and loading: MiLoRA's checkpoints, and the check that the base is the right one."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from rankwise.directions.basehash import base_hashes, check_base, weight_hashes
from rankwise.directions.checkpoint import (
    SIDE_FILE,
    WRITE_AGAIN,
    Pair,
    plain_config,
    read_side,
    split_state,
    stack_state,
    start_distance,
    write_side,
)
from rankwise.directions.variants import START
from rankwise.errors import UserError
from rankwise.peft_bridge import adapted_layers
from rankwise.tuner import VariantModel

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

        With it nothing is decomposed: factors and start come from the checkpoint, and the base weights are compared
        with those that the adapter was begun on.

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
            raise UserError(f"{path} has settings not known here ({', '.join(sorted(unknown))}): update rankwise")
        try:
            config = cls(**settings | {"init_lora_weights": False, "inference_mode": False})
        except (TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}): {WRITE_AGAIN}") from error
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
        unknown = {name: layer.get_base_layer().weight for name, layer in layers.items() if name not in self._known}
        hashes = self._known | weight_hashes(unknown)
        for name in layers.keys() & hashes.keys():
            layers[name].base_hashes = getattr(layers[name], "base_hashes", {}) | {adapter_name: hashes[name]}
        self._known = {}

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
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, found)
        return remapped

    @classmethod
    def _convert_state_dict_for_initial_model(cls, *_: Any, **__: Any) -> NoReturn:
        """PEFT's hook for starts that change the base: refused, since there is nothing to convert."""
        raise UserError(
            "save_pretrained(path_initial_model_for_weight_conversion=...) is not needed: what is saved is plain LoRA "
            "on the original base already; leave it out"
        )


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
    if adapter in layer.lora_embedding_A:
        a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    else:
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return Pair(a.detach(), b.detach(), start.A.reshape(a.shape), start.B.reshape(b.shape))


def check_start(live: Mapping[str, Pair], state: Mapping[str, Tensor]) -> None:
    """Compare the start that was computed here with that of a checkpoint, where its config was not read.

    Raises:
        UserError: their products differ by more than solvers do.
    """
    for key, a0 in state.items():
        name = key.removesuffix(f".{START}.A").removeprefix("base_model.model.")
        if not key.endswith(f".{START}.A") or live[name].A0.is_meta:
            continue
        pair = live[name]
        b0 = state[f"{key.removesuffix('.A')}.B"]
        far = start_distance(pair._replace(A=a0.to(pair.A0.device), B=b0.to(pair.B0.device)))
        if far > SAME_START:
            raise UserError(
                f"{name}: the checkpoint was begun on another base, or from another part of it (its start differs by "
                f"{far:.1%}): load the model that it was begun on, or take the config from "
                "MiloraConfig.from_pretrained, which compares the base weights themselves"
            )
