"""Is this the base that an adapter was begun on? Hashes of base weights, and their comparison."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rankwise.errors import UserError

CHUNK = 2**26  # bytes that are copied from another device at a time


def weight_hash(weight: Tensor) -> str | None:
    """``<dtype>:<hash>`` of a weight as it is stored: BLAKE2b with 16 bytes over its shape and its bytes, in hex.

    A quantised weight is hashed in its packed form.

    Returns:
        The hash, or None where there are no values to read: on the meta device, or gathered elsewhere.
    """
    if weight.is_meta or weight.numel() == 0:
        return None
    digest = hashlib.blake2b(digest_size=16)
    for part in _stored(weight.detach()):
        digest.update(repr(tuple(part.shape)).encode())
        content = part.contiguous().reshape(-1).view(torch.uint8)
        for first in range(0, len(content), CHUNK):
            digest.update(content[first : first + CHUNK].cpu().numpy().data)
    return f"{_kind(weight)}:{digest.hexdigest()}"


def _stored(weight: Tensor) -> list[Tensor]:
    """The plain tensors in which a weight is stored: one, or several for a tensor type of its own (torchao's)."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight.data]
    names, _ = weight.__tensor_flatten__()
    return [part for name in names for part in _stored(getattr(weight, name))]


def _kind(weight: Tensor) -> str:
    dtype = str(weight.dtype).removeprefix("torch.")
    return f"{type(weight.data).__name__} {dtype}" if hasattr(weight, "__tensor_flatten__") else dtype


def weight_hashes(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Hashes of several weights by name, side by side; those without values to read are left out."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing a large buffer lets other threads run
        found = dict(zip(weights, pool.map(weight_hash, weights.values()), strict=True))
    return {name: value for name, value in found.items() if value is not None}


def base_hashes(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Hashes of the base weights of these modules, by name; those without values to read are left out.

    Raises:
        UserError: the model has no such module.
    """
    weights = {}
    for name in names:
        try:
            module = model.get_submodule(name)
        except AttributeError as error:
            raise UserError(
                f"{name} is adapted in the checkpoint, and the model has no such module: load the model that the "
                "adapter was begun on"
            ) from error
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        weight = getattr(base, "weight", None)
        if isinstance(weight, Tensor):
            weights[name] = weight
    return weight_hashes(weights)


def check_base(saved: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Compare the hashes of a checkpoint's base with those of the model at hand.

    A weight in another dtype (a base that is quantised now, say) cannot be compared; it is counted in a warning.

    Raises:
        UserError: a weight of the same dtype differs.
    """
    comparable = [name for name in saved if _dtype(saved[name]) == _dtype(found.get(name, ""))]
    changed = [name for name in comparable if saved[name] != found[name]]
    if changed:
        raise UserError(
            f"{changed[0]}: the base weight is not the one that this adapter was begun on ({len(changed)} of "
            f"{len(comparable)} weights differ): load the model that it was begun on, or start a new adapter"
        )
    if others := len(saved) - len(comparable):
        warnings.warn(
            f"{others} of {len(saved)} base weights have another dtype than where this adapter was begun, so that "
            "nothing can tell whether they are the same weights",
            stacklevel=2,
        )


def _dtype(value: str) -> str:
    return value.rpartition(":")[0]
