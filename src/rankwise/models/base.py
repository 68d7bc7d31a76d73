"""A base model as its files have it: all of its weights, in their shapes, and none that they cannot hold."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from rankwise.errors import UserError
from rankwise.models.index import read_index

_PER_BYTE = 8  # weights that a byte of a file can hold, at most
_NEW = 2**26  # weights that files may lack at most: a new head's, a pooler's


def load_base(kind: Any, place: str, head: bool = False, **options: Any) -> PreTrainedModel:
    """The model of a folder or a hub id, from safetensors, with all of its weights.

    transformers makes weights of random numbers that the files lack, and leaves out layers that the config does not
    count. The former are refused; of the latter a warning tells the number.

    Args:
        kind: the model's class, or one of transformers' that choose it by the config.
        place: the folder or the hub id.
        head: whether the model gets a new head: what is beyond its base, and a pooler, may not be in the files.
        options: further ones of ``from_pretrained``.

    Raises:
        UserError: the files lack weights of the model or have them in other shapes, the config describes a model far
            larger than they are, or the folder's index is none.
    """
    read_index(Path(place))
    _check_size(kind, place)
    model: PreTrainedModel
    model, found = kind.from_pretrained(
        place,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are looked at here
        **options,
    )
    keys = list(model.state_dict())
    for key, saved, wanted in sorted(found["mismatched_keys"]):
        if not (head and _of_head(key, model)):
            raise UserError(
                f"{place}: {key} has the shape {tuple(saved)} in its files and {tuple(wanted)} by its config.json: "
                "fetch both again"
            )
    missing = [key for key in keys if key in found["missing_keys"]]
    new = {key for key in keys if head and _of_head(key, model)} | _new_pooler(keys, missing, head)
    if lacking := [key for key in missing if key not in new]:
        raise UserError(
            f"{place}: its files lack {len(lacking)} of the weights of {type(model).__name__} ({lacking[0]} is the "
            "first), which would be random numbers: give a whole checkpoint, of such a model"
        )
    _tell_left_out(place, keys, found["unexpected_keys"])
    return model


def _of_head(key: str, model: PreTrainedModel) -> bool:
    return not key.startswith(f"{model.base_model_prefix}.")


def _new_pooler(keys: list[str], missing: list[str], head: bool) -> set[str]:
    """That of a base which was pretrained without one."""
    pooler = {key for key in keys if "pooler" in key}
    return pooler if head and pooler <= set(missing) else set()


def _tell_left_out(place: str, keys: list[str], unexpected: Iterable[str]) -> None:
    """Warn of weights that are called as the model's are, but for the numbers of their layers."""
    patterns = {_without_numbers(key) for key in keys}
    left = sorted(key for key in unexpected if _without_numbers(key) in patterns)
    if left:
        warnings.warn(
            f"{place}: {len(left)} weights of its files are in layers that its config.json does not count, and are "
            f"left out ({left[0]} is one)",
            stacklevel=2,
        )


def _without_numbers(key: str) -> str:
    return re.sub(r"\d+", "#", key)


def _check_size(kind: Any, place: str) -> None:
    size = sum(file.stat().st_size for file in Path(place).glob("*.safetensors"))
    if not size:  # of a hub id, or of a folder that from_pretrained refuses
        return
    config = AutoConfig.from_pretrained(place, trust_remote_code=False)
    with torch.device("meta"):
        model = kind.from_config(config, trust_remote_code=False) if hasattr(kind, "from_config") else kind(config)
    weights = sum(weight.numel() for weight in model.parameters())
    if weights > _PER_BYTE * size + _NEW:
        raise UserError(
            f"{place}: config.json describes a model of {weights:,} weights, and its files have {size:,} bytes: fetch "
            "both again"
        )
