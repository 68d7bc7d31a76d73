"""MiLoRA on disk: plain LoRA of rank 2r, which anyone can load, and a small side file from which training goes on.

``B A - B0 A0`` is ``[B, -B0] [A; A0]``. That product is what is saved under the names of plain LoRA; ``milora.json``
beside it says that the lower half is the start, and on which base weights the adapter was begun.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download
from jaxtyping import Float
from peft import LoraConfig
from peft.utils import CONFIG_NAME
from torch import Tensor

from rankwise.errors import UserError, shown
from rankwise.files import write_json
from rankwise.reading import read_json

SIDE_FILE = "milora.json"
FORMAT = 1
WRITE_AGAIN = "save the adapter again, or take an earlier checkpoint"

_FACTOR = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?:embedding_)?(?P<factor>[AB])(?:\.weight)?$")


class Pair(NamedTuple):
    """The trained factors and their start, in the layout of PEFT: A by rows, B by columns."""

    A: Float[Tensor, "rank *in"]
    B: Float[Tensor, "out rank *ones"]
    A0: Float[Tensor, "rank *in"]
    B0: Float[Tensor, "out rank *ones"]


class Side(NamedTuple):
    """What ``milora.json`` holds: the config's fields, and the hash of each adapted base weight."""

    config: dict[str, Any]
    base: dict[str, str]


def stack_pair(pair: Pair) -> tuple[Float[Tensor, "twice *in"], Float[Tensor, "out twice *ones"]]:
    """[A; A0] and [B, -B0], whose product is ``B A - B0 A0``, in the dtype of the trained factors."""
    a0 = pair.A0.reshape(pair.A.shape).to(pair.A.dtype)
    b0 = pair.B0.reshape(pair.B.shape).to(pair.B.dtype)
    return torch.cat([pair.A, a0]), torch.cat([pair.B, -b0], dim=1)


def split_pair(a: Float[Tensor, "twice *in"], b: Float[Tensor, "out twice *ones"]) -> Pair:
    """The pair that :func:`stack_pair` stacked, to the bit."""
    rank = len(a) // 2
    return Pair(a[:rank].clone(), b[:, :rank].contiguous(), a[rank:].clone(), -b[:, rank:])


def stack_state(state: Mapping[str, Tensor], adapter: str, start: str) -> dict[str, Tensor]:
    """A model's adapter tensors as plain LoRA of rank 2r.

    Args:
        state: by the model's names, ``...lora_A.<adapter>.weight`` or ``...lora_embedding_A.<adapter>``.
        adapter: its name.
        start: what the frozen pair is called, in place of ``lora_A``.

    Returns:
        The same without the pairs, which are stacked below their factors; all else as it was.
    """
    stacked = {name: tensor for name, tensor in state.items() if f".{start}.{adapter}." not in name}
    for name, a0 in state.items():
        if not name.endswith(f".{start}.{adapter}.A"):
            continue
        module = name.removesuffix(f".{start}.{adapter}.A")
        plain = f"{module}.lora_A.{adapter}.weight", f"{module}.lora_B.{adapter}.weight"
        embedding = f"{module}.lora_embedding_A.{adapter}", f"{module}.lora_embedding_B.{adapter}"
        a, b = plain if plain[0] in state else embedding
        pair = Pair(state[a], state[b], a0, state[f"{module}.{start}.{adapter}.B"])
        stacked[a], stacked[b] = stack_pair(pair)
    return stacked


def split_state(
    state: Mapping[str, Tensor], shapes: Mapping[str, tuple[torch.Size, torch.Size]], start: str
) -> dict[str, Tensor]:
    """A checkpoint's tensors with each stacked pair taken apart: the inverse of :func:`stack_state`.

    Args:
        state: by the checkpoint's names, ``...lora_A.weight`` or ``...lora_embedding_A``.
        shapes: of A and of B in the model, by the module's name in the base model.
        start: what the frozen pair is called, in place of ``lora_A``.

    Raises:
        UserError: a module has no tensors or ones of another shape, or tensors belong to no adapted module.
    """
    state = _with_starts_below(state, start)
    names = _factor_names(state)
    if missing := [module for module in shapes if names.get(module, {}).keys() != {"A", "B"}]:
        raise UserError(f"{missing[0]}: the checkpoint lacks its LoRA matrices{_others(missing)}: {WRITE_AGAIN}")
    if unknown := [module for module in names if module not in shapes]:
        raise UserError(
            f"{unknown[0]}: the checkpoint adapts it{_others(unknown)}, this adapter does not: load it with the config "
            "from MiloraConfig.from_pretrained"
        )
    found = dict(state)
    for module, (shape_a, shape_b) in shapes.items():
        a, b = names[module]["A"], names[module]["B"]
        _check_shape(a, state[a], shape_a, 0)
        _check_shape(b, state[b], shape_b, 1)
        prefix = a.rpartition(".lora_")[0]
        found[a], found[b], found[f"{prefix}.{start}.A"], found[f"{prefix}.{start}.B"] = split_pair(state[a], state[b])
    return found


def _with_starts_below(state: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    """A checkpoint of rankwise 0.1.0, which has the starts under names of their own, in the form of later ones."""
    found = dict(state)
    for prefix in [name.removesuffix(f".{start}.A") for name in state if name.endswith(f".{start}.A")]:
        a, b = f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"
        pair = Pair(state[a], state[b], found.pop(f"{prefix}.{start}.A"), found.pop(f"{prefix}.{start}.B"))
        found[a], found[b] = stack_pair(pair)
    return found


def _factor_names(state: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """Names of the tensors A and B, by module."""
    names: dict[str, dict[str, str]] = {}
    for name in state:
        if found := _FACTOR.match(name):
            names.setdefault(found["module"], {})[found["factor"]] = name
    return names


def _check_shape(name: str, tensor: Tensor, shape: torch.Size, axis: int) -> None:
    stacked = [2 * size if at == axis else size for at, size in enumerate(shape)]
    if list(tensor.shape) != stacked:
        raise UserError(
            f"{name} of the checkpoint has the shape {tuple(tensor.shape)}, where {tuple(stacked)} is needed (the "
            "start below A, or beside B): load it with the config from MiloraConfig.from_pretrained, or "
            f"{WRITE_AGAIN}"
        )


def _others(names: list[str]) -> str:
    return f" (and those of {len(names) - 1} more modules)" if len(names) > 1 else ""


def start_distance(pair: Pair) -> float:
    """How far ``B A`` is from ``B0 A0``: the Frobenius norm of their difference over that of ``B0 A0``."""
    a, b, a0, b0 = _wide(pair)
    difference, norm = _norm(torch.cat([b, -b0], dim=1), torch.cat([a, a0])), _norm(b0, a0)
    return difference / max(norm, torch.finfo(torch.float32).tiny)


def start_ratio(pair: Pair) -> float:
    """The c for which ``c B0 A0`` is nearest to ``B A``."""
    a, b, a0, b0 = _wide(pair)
    return float(((b.T @ b0) * (a @ a0.T)).sum()) / max(_norm(b0, a0) ** 2, torch.finfo(torch.float32).tiny)


def _wide(pair: Pair) -> Pair:
    """The four as matrices in float64, on the device of A."""
    return Pair(*(factor.flatten(1).double().to(pair.A.device) for factor in pair))


def _norm(b: Float[Tensor, "out k"], a: Float[Tensor, "k in"]) -> float:
    """Frobenius norm of ``b @ a`` from two matrices of k x k: the product is never formed."""
    return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())


def plain_config(config: LoraConfig) -> LoraConfig:
    """The config of plain LoRA of rank 2r in which every layer keeps its scaling.

    Every rank is doubled, in ``r`` and in ``rank_pattern``; every alpha grows by 2, or by sqrt(2) where the scaling is
    ``alpha / sqrt(r)`` (``use_rslora``).
    """
    growth = 2**0.5 if config.use_rslora else 2
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    settings = {name: value for name, value in config.to_dict().items() if name in known}
    settings |= {
        "r": 2 * config.r,
        "lora_alpha": growth * config.lora_alpha,
        "rank_pattern": {name: 2 * rank for name, rank in (config.rank_pattern or {}).items()},
        "alpha_pattern": {name: growth * alpha for name, alpha in (config.alpha_pattern or {}).items()},
        "init_lora_weights": True,
    }
    return LoraConfig(**settings)


def write_side(folder: Path, config: LoraConfig, base: Mapping[str, str]) -> None:
    """Write ``milora.json``: the format, all fields of the config, and the base weights' hashes."""
    settings = {
        name: sorted(value) if isinstance(value, set) else value for name, value in sorted(config.to_dict().items())
    }
    settings["init_lora_weights"] = True  # False only in an adapter that was loaded, and computes no start
    write_json(folder / SIDE_FILE, {"format": FORMAT, "config": settings, "base": dict(base)})


def read_side(folder: str | Path, subfolder: str | None = None, **download: Any) -> Side:
    """Read ``milora.json`` from a folder, or from a repository of the Hugging Face Hub.

    Args:
        folder: a local folder, or a repository's id.
        subfolder: where the adapter lies within it.
        download: passed on to ``huggingface_hub.hf_hub_download``.

    Raises:
        UserError: there is none, it is damaged, or it is of another format.
    """
    path = Path(folder, subfolder or "", SIDE_FILE)
    if not path.is_file() and (first := _first_form(path.parent)) is not None:
        return first
    if not path.is_file():
        path = _downloaded(str(folder), subfolder, path, download)
    side = read_json(path, dict, WRITE_AGAIN)
    if side.get("format") != FORMAT:
        found = shown(side.get("format"))
        raise UserError(f"{path} has the format {found}, where {FORMAT} is known: update rankwise, or {WRITE_AGAIN}")
    config, base = side.get("config"), side.get("base")
    if not isinstance(config, dict) or not isinstance(base, dict) or not all(isinstance(v, str) for v in base.values()):
        raise UserError(f"{path} is damaged (it needs an object 'config' and an object 'base'): {WRITE_AGAIN}")
    return Side(config, base)


def _first_form(folder: Path) -> Side | None:
    """What a checkpoint of rankwise 0.1.0 tells, whose config is MiLoRA's own and names no base weights."""
    path = folder / CONFIG_NAME
    if not path.is_file() or (found := read_json(path, dict, WRITE_AGAIN)).get("peft_type") != "MILORA":
        return None
    own = ("peft_type", "peft_version", "auto_mapping", "inference_mode")
    return Side({name: value for name, value in found.items() if name not in own}, {})


def _downloaded(repository: str, subfolder: str | None, wanted: Path, download: dict[str, Any]) -> Path:
    failure: Exception | None = None
    if not Path(repository).exists():
        try:
            return Path(hf_hub_download(repository, SIDE_FILE, subfolder=subfolder, **download))
        except (OSError, ValueError) as error:
            failure = error
    raise UserError(
        f"{wanted} does not exist, so this is no checkpoint of MiLoRA: give the folder that save_pretrained wrote, or "
        "load it as plain LoRA with PeftModel.from_pretrained alone"
    ) from failure
