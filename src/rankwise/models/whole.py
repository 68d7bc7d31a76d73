"""A model as its files have it: no weight is missing, and none is made that they cannot hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from rankwise.errors import UserError
from rankwise.models.index import read_index

_PER_BYTE = 8  # weights that a byte of a file can hold, at most
_NEW = 2**26  # weights that a checkpoint may lack: of a new head


def load_whole(kind: Any, place: str, head: bool = False, **options: Any) -> PreTrainedModel:
    """The model of a folder or a hub id, from safetensors, with all of its weights.

    transformers fills weights that the files lack with random numbers.

    Args:
        kind: the model's class, or one of transformers' that choose it by the config.
        place: the folder or the hub id.
        head: whether the model gets a new head, which the files may lack.
        options: further ones of ``from_pretrained``.

    Raises:
        UserError: the files lack weights of the model, the config describes one far larger than they are, or the files
            of a folder are named by something else than its index.
    """
    read_index(Path(place))
    _check_size(kind, place)
    model, found = kind.from_pretrained(
        place, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options
    )
    inside = f"{model.base_model_prefix}."  # a pooler is new where the base was pretrained without one
    lacking = sorted(
        key for key in found["missing_keys"] if "pooler" not in key and (key.startswith(inside) or not head)
    )
    if lacking:
        raise UserError(
            f"{place}: its files lack {len(lacking)} of the weights of {type(model).__name__} ({lacking[0]} is the "
            "first), which would be random numbers: give a whole checkpoint, of such a model"
        )
    whole: PreTrainedModel = model
    return whole


def _check_size(kind: Any, place: str) -> None:
    size = sum(file.stat().st_size for file in Path(place).glob("*.safetensors"))
    if not size:  # of a hub id, or a folder that from_pretrained refuses
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
