"""Which model is this? A hash of all that its log-probabilities depend on."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rankwise.directions.basehash import base_hash, weight_hash
from rankwise.errors import UserError, nearest
from rankwise.likelihood import unwrapped

SCORING = 2  # raised whenever log-probabilities come out differently, beyond rounding

# Settings of a model's config that do not change what it computes, while loading, saving and trainers do change them.
_OTHER_SETTINGS = re.compile(
    r"^_|^output_|^return_dict|_token_id$|dtype$|label|dropout|_pdrop$|"
    "^(architectures|transformers_version|use_cache|problem_type|chunk_size_feed_forward|initializer_range)$"
)


def fingerprint(model: nn.Module, adapters: Sequence[str] = (), precision: torch.dtype | None = None) -> str:
    """A hash of all that a model's log-probabilities depend on, rounding aside, as 32 hexadecimal digits.

    That is: every weight of the base, its dtype, its config; weights and scalings of the adapters that are on; and
    what autocast computes in. It is the same on every device, in training and evaluation mode, inside a wrapper of PEFT
    or of DistributedDataParallel, and whatever other adapters there are. Of a base that is packed (bitsandbytes,
    torchao) it is of the codes and scales, and of the library's version and device too.

    Args:
        model: a causal language model.
        adapters: names of the adapters that are on; none for the base alone.
        precision: dtype of autocast, where it is on.

    Raises:
        UserError: weights are on the meta device, spread over processes or packed in a way that is not to be read;
            there is no such adapter; or it is one of trained prompts.
    """
    base, kinds = unwrapped(model), _adapter_kinds(model, adapters)
    read: dict[str, Any] = {}
    for name, module in _plain_modules(base):
        adapts = isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        read |= _adapter_values(module, name, adapters) if adapts else _own_values(module, name)
    lines = [f"{name} {value}" for name, value in _hashes(read).items()]
    lines += [f"scoring {SCORING}", f"autocast {precision}", *kinds]
    lines.append(json.dumps(_settings(base.config.to_dict()), sort_keys=True, default=str))
    return hashlib.blake2b("\n".join(sorted(lines)).encode(), digest_size=16).hexdigest()


def tokenizer_label(tokenizer: PreTrainedTokenizerBase) -> str:
    """A tokenizer in a few words: its class, how many tokens it has, and the start of a hash of them and their ids."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    found = hashlib.blake2b(vocabulary.encode(), digest_size=4).hexdigest()
    return f"{type(tokenizer).__name__} of {len(tokenizer):,} tokens, {found}"


def _adapter_kinds(model: nn.Module, adapters: Sequence[str]) -> list[str]:
    inner = getattr(model, "module", model)
    known = inner.peft_config if isinstance(inner, PeftModel) else {}
    for name in adapters:
        if name not in known:
            raise UserError(
                f"adapter {name!r} is none of the model's: {nearest(name, known) if known else 'it has none'}"
            )
        if known[name].is_prompt_learning:
            raise UserError(
                f"adapter {name!r} is one of trained prompts, under which no log-probabilities are kept on disk: give "
                "no folder for them"
            )
    return [f"adapter {number} {known[name].peft_type.value}" for number, name in enumerate(adapters)]


def _plain_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module of the base by its name there, and each of PEFT's around one of them by the name of that one."""
    yield name, module
    if isinstance(module, BaseTunerLayer):
        yield from _plain_modules(module.base_layer, name)
    elif isinstance(module, AuxiliaryTrainingWrapper):
        yield from _plain_modules(module.original_module, name)
    else:
        for child_name, child in module.named_children():
            yield from _plain_modules(child, f"{name}.{child_name}".lstrip("."))


def _own_values(module: nn.Module, name: str) -> dict[str, Any]:
    """A module's own weights and buffers; one that may be packed is read from its module."""
    tensors: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    passing = module._non_persistent_buffers_set  # computed from the config, on each device with a rounding of its own
    tensors |= {own: value for own, value in module.named_buffers(recurse=False) if own not in passing}
    return {f"{name}.{own}": module if own == "weight" else value for own, value in tensors.items()}


def _adapter_values(layer: Any, name: str, adapters: Sequence[str]) -> dict[str, Any]:
    """What one of PEFT's modules holds for adapters: tensors, and settings such as its scaling."""
    found: dict[str, Any] = {}
    for part in (*layer.adapter_layer_names, *layer.other_param_names):
        held = attrgetter(part)(layer)
        for number, adapter in enumerate(adapters):
            if "dropout" not in part and hasattr(held, "keys") and adapter in held.keys():
                value, prefix = held[adapter], f"{name} adapter {number} {part}"
                inner = value.state_dict() if isinstance(value, nn.Module) else {"": value}
                found |= {f"{prefix} {own}": one for own, one in inner.items()}
    return found


def _hashes(read: dict[str, Any]) -> dict[str, str]:
    """A hash of each tensor, side by side, one that goes by several names once; numbers and words as they are."""
    keys = {name: id(value.weight if isinstance(value, nn.Module) else value) for name, value in read.items()}
    tensors = {keys[name]: (name, one) for name, one in read.items() if isinstance(one, Tensor | nn.Module)}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing a large buffer lets other threads run
        found = dict(zip(tensors, pool.map(lambda item: _hash(*item), tensors.values()), strict=True))
    plain = {name: repr(one) for name, one in read.items() if isinstance(one, int | float | str | list)}
    return {name: found[key] for name, key in keys.items() if key in found} | plain


def _hash(name: str, value: Tensor | nn.Module) -> str:
    if isinstance(value, Tensor) and value.numel() == 0:
        return f"{value.dtype} {tuple(value.shape)}"
    found = weight_hash(value) if isinstance(value, Tensor) else base_hash(value)
    if found is None:
        raise UserError(
            f"{name} cannot be read whole (it is on the meta device, spread over processes or packed), so that nobody "
            "could tell later which model log-probabilities are of: give no folder for them, or compute them in one "
            "process with the whole model in memory"
        )
    return found


def _settings(config: Any) -> Any:
    """What of a config, and of those within it, says how the model computes."""
    if not isinstance(config, dict):
        return config
    return {str(key): _settings(value) for key, value in config.items() if not _OTHER_SETTINGS.search(str(key))}
