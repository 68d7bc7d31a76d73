"""The state of a training in one safetensors file: nested mappings and lists of tensors, numbers and texts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rankwise.errors import UserError

STATE = "state"  # the key of the file's metadata that says how its tensors are nested
PLAIN = (bool, int, float, str, type(None))


def write_state(path: Path, state: Any) -> None:
    """Write what ``state_dict`` of an optimizer or a scheduler returns, say, without pickle.

    Args:
        path: of the file.
        state: tensors (of any dtype that safetensors knows), NumPy arrays, numbers, texts and None, in mappings with
            keys that are texts or integers, lists and tuples.

    Raises:
        TypeError: it holds something else.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_packed(state, tensors))
    save_file(tensors, path, metadata={STATE: text})


def read_state(path: Path) -> Any:
    """What :func:`write_state` wrote; arrays come back as tensors, on the CPU.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            return _unpacked(json.loads((file.metadata() or {})[STATE]), tensors)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} holds no state of a training that can be read ({error}): take another one") from error


def _packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON, its tensors apart."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Mapping):
        if unlike := [key for key in value if not isinstance(key, str | int)]:
            raise TypeError(f"the key {unlike[0]!r} is neither a text nor an integer")
        return {"mapping": [[key, _packed(inner, tensors)] for key, inner in value.items()]}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_packed(inner, tensors) for inner in value]}
    raise TypeError(f"{type(value).__name__} cannot be kept in a state file")


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "tensor":
        return tensors[held]
    if kind == "mapping":
        return {key: _unpacked(inner, tensors) for key, inner in held}
    if kind not in ("list", "tuple"):
        raise ValueError(f"{kind!r} is no kind of value")
    items = [_unpacked(inner, tensors) for inner in held]
    return tuple(items) if kind == "tuple" else items
