"""A model's weights without the model: its shapes from its config, its values from its files, one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from rankwise.errors import UserError, cut, shown
from rankwise.models import loading, resolve
from rankwise.models.config import check_config
from rankwise.models.index import INDEX, read_index
from rankwise.reading import open_tensors

SINGLE = "model.safetensors"


def model_folder(model: str) -> Path:
    """The folder of a model: as given, the shipped one's for ``embedded``, or a hub id's in the local cache.

    Raises:
        UserError: the folder is no model's, or the hub id cannot be downloaded.
    """
    place = Path(resolve(model))
    if place.is_dir():
        return place
    wanted = ["config.json", "model*.safetensors", INDEX]
    try:
        return Path(snapshot_download(model, allow_patterns=wanted))
    except (OSError, ValueError) as error:  # what huggingface_hub raises comes from one of the two
        raise UserError(
            f"model {model} is no folder and cannot be downloaded: {cut(' '.join(str(error).split()), 300)}"
        ) from error


def meta_model(folder: Path) -> PreTrainedModel:
    """The model of a folder's ``config.json``, on the meta device: its modules and shapes without any weight.

    Raises:
        UserError: the config cannot be read, is of a quantised model, or names no architecture of transformers.
    """
    check_config(folder)
    with loading(f"{folder / 'config.json'}"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"{folder} is a quantised checkpoint, whose weights are packed: give the checkpoint as it was before "
            "quantisation; the start then loads on the quantised model"
        )
    kind = model_class(config, folder / "config.json")
    with torch.device("meta"), loading(f"the model of {folder / 'config.json'}"):
        return kind(config)


def model_class(config: PretrainedConfig, where: str | Path) -> type[PreTrainedModel]:
    """The class that a model's config names.

    Raises:
        UserError: it names none that transformers has; ``where`` says where it was read.
    """
    names = config.architectures or []
    kind = getattr(transformers, str(names[0]), None) if names else None
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise UserError(f"architectures {shown(names)} in {where}: transformers has no such model")
    return kind


class ModelFiles:
    """The weights of a checkpoint by their names in the model, read one at a time.

    Names may differ between the two as they do for ``from_pretrained``: by the prefix of the base model, by
    transformers' own renamings, and where one weight is tied to another.

    Args:
        folder: with ``model.safetensors``, or its shards and their index.
        model: of the checkpoint's architecture, on the meta device, without adapters.

    Raises:
        UserError: the folder holds no safetensors checkpoint, or its index is no such file.
    """

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        self.folder = folder
        self._files = _files(folder)
        self._shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        self._keys = _keys_by_name(model, self._files, self._shapes)
        self._tied = _tied_names(model)

    def check(self, names: Iterable[str]) -> None:
        """Refuse weights that the checkpoint does not have, and files that are not there, before anything is read.

        Raises:
            UserError: a weight has no key in the checkpoint, or its file is missing.
        """
        for name in names:
            path = self.folder / self._files[self._key(name)]
            if not path.is_file():
                raise UserError(f"{path} is not there, and should hold {name}: fetch the checkpoint again")

    def weight(self, name: str) -> Tensor:
        """One weight, in the dtype of its file, whose pages are read when they are used.

        Raises:
            UserError: the checkpoint has no such weight, its shape is another, or its file is missing or damaged.
        """
        key = self._key(name)
        path = self.folder / self._files[key]
        with open_tensors(path, "fetch the file again") as file:
            weight: Tensor = file.get_tensor(key)
        if tuple(weight.shape) != self._shapes[name]:
            raise UserError(
                f"{key} in {path} has shape {tuple(weight.shape)} where the model of config.json has "
                f"{self._shapes[name]}: the two do not belong together"
            )
        return weight

    def _key(self, name: str) -> str:
        """What the checkpoint calls a weight of the model."""
        for other in (name, *self._tied.get(name, ())):
            if other in self._keys:
                return self._keys[other]
        raise UserError(
            f"{self.folder} has no weight for {name}: leave its module out of target_modules, or, where transformers "
            "makes the weight from others while loading, load the model and use get_peft_model"
        )


def _files(folder: Path) -> dict[str, str]:
    """The file of each key of the checkpoint."""
    if found := read_index(folder):
        return found
    single = folder / SINGLE
    if not single.is_file():
        raise UserError(f"{folder} holds no {SINGLE} and no {INDEX}: {_remedy(folder)}")
    with open_tensors(single, "fetch the file again") as file:
        return dict.fromkeys(file.keys(), SINGLE)


def _remedy(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth"))
    if not pickles:
        return "give the folder of a whole model"
    return (
        f"{pickles[0]} is a pickle, which can run code and is not read; where you trust it, load the model with "
        "transformers and save_pretrained it into another folder"
    )


def _keys_by_name(model: PreTrainedModel, files: Mapping[str, str], shapes: Mapping[str, Any]) -> dict[str, str]:
    """The checkpoint's key of each weight of the model, by transformers' own rules, conversions left out."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix
    found = {}
    for key in files:
        name, converted = rename_source_key(key, renamings, converters, prefix, shapes)
        if name not in shapes and key in shapes:
            name, converted = key, None
        if converted is None:
            found[name] = key
    return found


def _tied_names(model: PreTrainedModel) -> dict[str, list[str]]:
    """Names under which the model has the same weight again."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: [other for other in same if other != name] for same in names.values() for name in same}
