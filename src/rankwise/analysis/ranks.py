"""The ranks of a saved adapter: stored, live and effective, by module."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.analysis.spectra import effective_rank
from rankwise.errors import UserError, cut
from rankwise.files import check_folder
from rankwise.peft_bridge.patterns import check_patterns
from rankwise.reading import open_tensors, read_json

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SIDE_FILE = "milora.json"  # beside an adapter that stores its start: as directions.checkpoint writes it
_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<part>embedding_A|embedding_B|A|B|E|gate|start\.A|start\.B)(?:\..+)?$"
)
_LAYER = re.compile(r"(?P<stack>(?:.*?\.)?)(?P<number>\d+)\.(?P<kind>.+)$")


@dataclass(frozen=True)
class RankGrid:
    """A pivot for a heat map: layers down, kinds of module across, ``None`` where there is no module."""

    layers: list[str]
    kinds: list[str]
    ranks: list[list[int | None]]


def read_ranks(adapter_folder: Path) -> list[dict[str, Any]]:
    """One row a module of a LoRA adapter; see :func:`read_adapter`, which also counts what it passes over."""
    return read_adapter(adapter_folder)[0]


def read_adapter(adapter_folder: Path) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Read the ranks of a LoRA adapter from its folder.

    Returns:
        Rows with ``module``; ``rank``, the stored one; ``live``, the number of directions whose row of A,
        column of B and gate (AdaLoRA: value of E), if it has one, are not zero, and which differ from the start
        where that is kept; ``effective_rank`` of the update, which is B A, or B A - B0 A0 then; ``configured_rank``,
        what the configuration says; ``parameters``, those trained; ``bytes``, all that is stored; and
        ``stacked_start``, whether half of it is the start of MiLoRA, [A; A0] and [B, -B0], so that rank r is stored
        as 2 r. Beside them the counts of tensors that belong to no pair A, B.

    Raises:
        UserError: the folder holds no adapter, one without LoRA matrices, or unreadable or damaged files.
    """
    folder = Path(adapter_folder)
    check_folder(folder)
    config = _read_config(folder)
    tensors, ignored = _read_tensors(folder / WEIGHTS)
    check_patterns(config, tensors, f"{folder / CONFIG}: ")
    stacked_start = (folder / SIDE_FILE).is_file()
    if stacked_start:
        from rankwise.directions.checkpoint import read_side

        config = read_side(folder).config
    complete = {module: parts for module, parts in tensors.items() if {"A", "B"} <= set(parts)}
    rows = [_row(module, parts, config, stacked_start) for module, parts in complete.items()]
    halves = len(tensors) - len(rows)
    counts = dict(ignored) | ({"modules with one LoRA matrix only": halves} if halves else {})
    if not rows:
        raise UserError(f"{folder / WEIGHTS} holds no pair lora_A, lora_B: give the folder of a LoRA adapter")
    return sorted(rows, key=lambda row: natural_key(row["module"])), counts


def _read_config(folder: Path) -> dict[str, Any]:
    """The adapter's configuration, once it is clear that the folder holds both of its files."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the folder that holds {WEIGHTS}")
    if not (folder / WEIGHTS).is_file() and (folder / "adapter_model.bin").is_file():
        raise UserError(
            f"{folder} holds adapter_model.bin, a pickle, which is not read: save the adapter as safetensors"
        )
    missing = [name for name in (WEIGHTS, CONFIG) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} is no adapter, it lacks {' and '.join(missing)}: give a run's adapter folder")
    config: dict[str, Any] = read_json(folder / CONFIG, dict, "save the adapter again")
    return config


def _read_tensors(path: Path) -> tuple[dict[str, dict[str, Tensor]], Counter[str]]:
    """LoRA tensors by module and part, and the counts of the other tensors."""
    modules: dict[str, dict[str, Tensor]] = {}
    ignored: Counter[str] = Counter()
    with open_tensors(path, "save the adapter again") as file:
        for key in file.keys():
            found = _KEY.match(key)
            if found is None:
                ignored["tensors other than LoRA"] += 1
            else:
                part = found["part"].removeprefix("embedding_")
                modules.setdefault(found["module"], {})[part] = file.get_tensor(key)
    return modules, ignored


def _row(module: str, parts: Mapping[str, Tensor], config: Mapping[str, Any], stacked_start: bool) -> dict[str, Any]:
    # flatten(1) lays the kernels of convolutions out as columns: their update is B A all the same.
    down, up = parts["A"].flatten(1), parts["B"].flatten(1)
    if down.shape[0] != up.shape[1]:
        raise UserError(
            f"{module}: lora_A has {down.shape[0]} rows, lora_B {up.shape[1]} columns: save the adapter again"
        )
    gate = parts.get("gate", parts.get("E", torch.ones(down.shape[0]))).flatten()
    gated = up.float() * gate.float()
    trained = [tensor for part, tensor in parts.items() if not part.startswith("start")]
    return {
        "module": module,
        "rank": down.shape[0],
        "live": live_directions(down, up, gate, _start(module, parts, stacked_start)),
        "effective_rank": effective_rank(update_spectrum(*_from_start(gated, down.float(), gate, parts))),
        "configured_rank": _configured_rank(module, config),
        "parameters": sum(tensor.numel() for tensor in trained) // (2 if stacked_start else 1),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in parts.values()),
        "stacked_start": stacked_start,
    }


def _start(module: str, parts: Mapping[str, Tensor], stacked: bool) -> tuple[Tensor, Tensor] | None:
    """A0 and B0, where they are kept: stacked in the lower half, or under a name of their own."""
    down, up = parts["A"].flatten(1), parts["B"].flatten(1)
    if stacked:
        if len(down) % 2:
            raise UserError(f"{module}: {len(down)} directions are no adapter with its start: save the adapter again")
        half = len(down) // 2
        return down[half:], -up[:, half:]
    if {"start.A", "start.B"} <= set(parts):
        return parts["start.A"].flatten(1).to(down.dtype), parts["start.B"].flatten(1).to(up.dtype)
    return None


def live_directions(
    down: Float[Tensor, "rank in"],
    up: Float[Tensor, "out rank"],
    gate: Float[Tensor, " rank"],
    start: tuple[Float[Tensor, "begun in"], Float[Tensor, "out begun"]] | None,
) -> int:
    """How many stored directions change something.

    Without a start, those whose row of A, column of B and gate are not zero. With one, b a - b0 a0 = (b - b0) a +
    b0 (a - a0): a direction whose two terms are zero changes nothing; where the start is stacked below A, each term
    stands for one of the two directions that are stored.
    """
    if start is None:
        return int((down.ne(0).any(dim=1) & up.ne(0).any(dim=0) & gate.ne(0)).sum())
    down0, up0 = start
    rank = len(down0)
    trained, other = down[:rank], up[:, :rank]
    of_b = other.ne(up0).any(dim=0) & trained.ne(0).any(dim=1)
    of_a = trained.ne(down0).any(dim=1) & up0.ne(0).any(dim=0)
    if rank < len(down):
        return int(of_b.sum() + of_a.sum())
    return int(((of_b | of_a) & gate.ne(0)).sum())


def _from_start(up: Tensor, down: Tensor, gate: Tensor, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Factors of the update B A - B0 A0, for an adapter that keeps the pair it started from under its own name.

    ``up`` is gated already; a gate multiplies the change of its direction, so it is on B0 as well.
    """
    if not {"start.A", "start.B"} <= set(parts):
        return up, down
    up = torch.cat([up, -parts["start.B"].flatten(1).float() * gate.float()], dim=1)
    return up, torch.cat([down, parts["start.A"].flatten(1).float()])


def update_spectrum(up: Float[Tensor, "out rank"], down: Float[Tensor, "rank in"]) -> Float[Tensor, " values"]:
    """Singular values of ``up @ down``, from a matrix of rank x rank only; the product is never formed.

    Values below the rounding of float32, measured by the factors, are zeros: in B A - B0 A0 much may cancel.
    """
    left = torch.linalg.qr(up.double(), mode="r").R
    right = torch.linalg.qr(down.double().T, mode="r").R
    values: Tensor = torch.linalg.svdvals(left @ right.T)
    rounding = torch.finfo(torch.float32).eps * left.norm() * right.norm()
    return values.where(values > rounding, 0.0)


def _configured_rank(module: str, config: Mapping[str, Any]) -> int | None:
    """The rank that a configuration gives a module, which may be none that PEFT would write."""
    try:
        return _rank_of(module, config)
    except (AttributeError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{CONFIG} gives {cut(module, 200)} no rank ({error!r}): save the adapter again") from error


def _rank_of(module: str, config: Mapping[str, Any]) -> int | None:
    """The rank that the configuration gives a module: by the first pattern, as peft matches, or ``r``.

    AdaLoRA's has what was allocated, a mask for each module by its full name, and begins with ``init_r``.
    """
    if config.get("peft_type") == "ADALORA":
        masks = config.get("rank_pattern") or {}
        return sum(masks[key]) if (key := f"{module}.lora_E") in masks else operator.index(config["init_r"])
    for pattern, rank in (config.get("rank_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return operator.index(rank)
    return operator.index(config["r"]) if config.get("r") is not None else None


def natural_key(name: str) -> list[tuple[int, str]]:
    """A sort key that puts layer 2 before layer 10."""
    parts = re.split(r"([0-9]{1,18})", name)
    return [(-1, part) if place % 2 == 0 else (int(part), "") for place, part in enumerate(parts)]


def split_module(module: str) -> tuple[str, str]:
    """Layer and kind of a module: ``model.layers.3.mlp.up_proj`` is ``("model.layers.3", "mlp.up_proj")``.

    The layer is empty for a module outside any numbered layer.
    """
    found = _LAYER.match(module)
    return (f"{found['stack']}{found['number']}", found["kind"]) if found else ("", module)


def rank_grid(rows: Sequence[Mapping[str, Any]], value: str = "rank") -> RankGrid:
    """Pivot rows with ``module`` and ``value`` into layers x kinds of module, in the model's order.

    Names are as short as they can be without two of them becoming one.
    """
    places = {split_module(row["module"]): int(row[value]) for row in rows}
    layers, kinds = layer_names(layer for layer, _ in places), kind_names(rows)
    grid = [[places.get((layer, kind)) for kind in kinds] for layer in layers]
    return RankGrid(list(layers.values()), list(kinds.values()), grid)


def layer_names(layers: Iterable[str]) -> dict[str, str]:
    """A short name of each layer, in the model's order; ``layers`` are those of :func:`split_module`."""
    ordered = sorted(set(layers), key=lambda layer: (layer == "", natural_key(layer)))
    stacks = {layer.rpartition(".")[0] for layer in ordered if layer}
    names = [layer if len(stacks) > 1 else f"layer {layer.rpartition('.')[2]}" for layer in ordered]
    return {layer: name if layer else "outside layers" for name, layer in zip(names, ordered, strict=True)}


def kind_names(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A short name of each kind of module, in the order in which the layers have them."""
    places = [split_module(row["module"]) for row in rows]
    layers = layer_names(layer for layer, _ in places)
    kinds = list(dict.fromkeys(kind for layer in layers for at, kind in places if at == layer))
    tails = Counter(kind.rpartition(".")[2] for kind in kinds)
    return {kind: tail if tails[tail := kind.rpartition(".")[2]] == 1 else kind for kind in kinds}
