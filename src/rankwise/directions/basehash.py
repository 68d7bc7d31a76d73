"""Is this the base that an adapter was begun on? Hashes of base weights, and their comparison."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rankwise.errors import UserError, cut
from rankwise.processes import is_spread, whole

CHUNK = 2**24  # numbers that are copied and widened at a time
NARROW = (torch.float16, torch.bfloat16)


def weight_hash(weight: Tensor) -> str | None:
    """``<dtype>:<hash>`` of a weight that is not packed: BLAKE2b with 16 bytes over its shape and values, in hex.

    float16 and bfloat16 are widened to float32 first, so that a weight has the same hash wherever it was loaded
    without rounding.

    Returns:
        The hash, or None where there are no whole values to read: on the meta device, or spread over processes.
    """
    if weight.is_meta or weight.numel() == 0 or hasattr(weight, "__tensor_flatten__"):
        return None
    return f"{str(weight.dtype).removeprefix('torch.')}:{_digest([weight])}"


def base_hash(module: nn.Module) -> str | None:
    """The hash of a base layer's weight; of a packed one (bitsandbytes, torchao) over its codes and its scales.

    How a packed weight came about is in the string too, before the colon: libraries and devices round their scales
    each in its own way, so that only within one of them another hash means another weight.

    Returns:
        The hash, or None where there is nothing to compare by: no values, no weight of this name, or codes that
        bitsandbytes has packed anew for inference on a CPU.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.is_meta:
        return None
    library = type(weight).__module__.partition(".")[0]
    if library == "torch" or (library == "bitsandbytes" and weight.is_floating_point()):  # the latter: not packed yet
        return weight_hash(weight)
    parts = _bitsandbytes_parts(module) if library == "bitsandbytes" else _parts(weight)
    if not parts:
        return None
    dtype = str(weight.dtype).removeprefix("torch.")
    return f"{type(weight).__name__} {dtype} {library} {_version(library)} {weight.device.type}:{_digest(parts)}"


def _bitsandbytes_parts(module: Any) -> list[Tensor]:
    """Codes and scales of a layer of 4 or 8 bit; none where they are not to be had."""
    weight = module.weight
    state = getattr(weight, "quant_state", None)
    if state is not None:
        if getattr(state, "packing_format_for_cpu", False):
            return []
        second = getattr(state, "state2", None)
        nested = [second.absmax, second.code] if second is not None else []
        scales = [state.absmax, state.code, state.offset, *nested]
    else:
        own = getattr(weight, "SCB", None)  # the layer takes it over when it first computes
        scales = [own if own is not None else getattr(getattr(module, "state", None), "SCB", None)]
    found = [scale for scale in scales if isinstance(scale, Tensor)]
    return [weight.data, *found] if found else []


def _parts(weight: Any) -> list[Tensor]:
    """The plain tensors in which a tensor type of its own (torchao's) is stored."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight.data]
    names, _ = weight.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(weight, name))]


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "?"


def _digest(parts: Sequence[Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(repr(tuple(part.shape)).encode())
        flat = part.detach().contiguous().reshape(-1)
        for first in range(0, len(flat), CHUNK):
            piece = flat[first : first + CHUNK].cpu()
            held = piece.float() if piece.dtype in NARROW else piece
            digest.update(held.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def module_hashes(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Hashes of several base layers by name, side by side; those that have none are left out.

    Weights that are spread over processes, all of which call this then, are fetched one after another.
    """
    spread = {name: module for name, module in modules.items() if is_spread(getattr(module, "weight", None))}
    found = {name: weight_hash(whole(module.weight)) for name, module in spread.items()}  # type: ignore[arg-type]
    others = {name: module for name, module in modules.items() if name not in spread}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing a large buffer lets other threads run
        found |= dict(zip(others, pool.map(base_hash, others.values()), strict=True))
    return {name: value for name, value in found.items() if value is not None}


def base_hashes(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Hashes of the base weights of these modules, by name; those that have none are left out.

    Raises:
        UserError: the model has no such module.
    """
    modules = {}
    for name in names:
        try:
            module = model.get_submodule(name)
        except AttributeError as error:
            raise UserError(
                f"{cut(name, 200)} is adapted in the checkpoint, and the model has no such module: load the model that "
                "the adapter was begun on"
            ) from error
        modules[name] = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return module_hashes(modules)


def check_base(saved: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Compare the hashes of a checkpoint's base with those of the model at hand.

    Equal hashes are the same weight, in whatever dtype it is. Where they differ and the weight is stored in another way
    too (rounded to bfloat16, say, or quantised), nothing can be told; that is counted in a warning.

    Raises:
        UserError: a weight differs that is stored as it was.
    """
    others = [name for name in saved if _value(saved[name]) != _value(found.get(name, ""))]
    changed = [name for name in others if _kind(saved[name]) == _kind(found.get(name, ""))]
    if changed:
        raise UserError(
            f"{cut(changed[0], 200)}: the base weight is not the one that this adapter was begun on ({len(changed)} of "
            f"{len(saved)} weights differ): load the model that it was begun on, or start a new adapter"
        )
    if others:
        warnings.warn(
            f"{len(others)} of {len(saved)} base weights have another dtype or packing than where this adapter was "
            "begun, so that nothing can tell whether they are the same weights",
            stacklevel=2,
        )


def _kind(value: str) -> str:
    return value.rpartition(":")[0]


def _value(value: str) -> str:
    return value.rpartition(":")[2]
