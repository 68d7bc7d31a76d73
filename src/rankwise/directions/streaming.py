"""A start for a whole model, written from its files with a few matrices in memory at a time."""

from __future__ import annotations

import copy
import time
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import peft
import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.utils import get_peft_model_state_dict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.directions.basehash import weight_hash
from rankwise.directions.cache import check_device, start_cache
from rankwise.directions.checkpoint import stack_pair
from rankwise.directions.dora import MAGNITUDE
from rankwise.directions.milora import MiloraConfig
from rankwise.directions.model_files import ModelFiles, meta_model, model_folder
from rankwise.directions.saving import live_pair
from rankwise.directions.tensor_file import DTYPES, TensorFile
from rankwise.errors import UserError
from rankwise.files import check_output, check_replaceable, new_folder
from rankwise.memory import return_free_memory
from rankwise.peft_bridge import adapted_layers
from rankwise.peft_bridge.matrices import factor_matrices
from rankwise.peft_bridge.patterns import check_patterns
from rankwise.peft_bridge.targets import check_sizes
from rankwise.saying import say

ADAPTER = "default"
START = "start"  # in the manifest of what is written here
LINEAR = ("lora_A.weight", "lora_B.weight")
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")


@dataclass(frozen=True)
class InitReport:
    """What was written.

    Attributes:
        ranks: of each module.
        energy: share of each weight's squared norm that its start holds, 0 to 1.
        zero: directions of each module whose singular value is numerically zero; modules without any are left out.
        reused: starts that came from the cache.
        broken: files of the cache that could not be used and were made again.
        seconds: that it took.
    """

    ranks: dict[str, int]
    energy: dict[str, float]
    zero: dict[str, int]
    reused: int
    broken: int
    seconds: float


def initialise(
    model: str,
    folder: str | Path,
    config: MiloraConfig,
    *,
    dtype: torch.dtype = torch.float32,
    console: Console | None = None,
) -> InitReport:
    """Write the start of :class:`MiloraConfig` for a model that is never loaded: one weight at a time, from its files.

    What is written is a checkpoint at step 0. It loads with ``PeftModel.from_pretrained(base, folder,
    config=MiloraConfig.from_pretrained(folder), is_trainable=True)``, on a quantised base too, and equals
    ``get_peft_model(base, config)`` on a base that holds the weights in the dtype of the files.

    Args:
        model: a folder with ``config.json`` and safetensors, a hub id, or ``embedded`` for the small model that ships
            here.
        folder: new, empty or an earlier start, which is replaced in one step when all is written.
        config: of the adapter. Where it names a ``cache``, finished weights are kept there, so that interrupted work
            goes on where it stopped.
        dtype: of the written A and B: float32 or another floating-point type, no narrower one with DoRA.
        console: where progress is shown; nowhere where it is not given.

    Returns:
        Ranks, captured energy, zero directions, what was reused, and the time.

    Raises:
        UserError: no such model, no safetensors, a quantised checkpoint, an architecture that transformers does not
            have, targets that match nothing, a rank above a weight's smaller side, a weight that is missing or not
            finite, a folder that holds something else, folder or cache that cannot be written to, or a setting for
            which there is no start (``init_lora_weights=False``, ``layer_replication``).
    """
    started = time.perf_counter()
    _check(Path(folder), config, dtype)
    source = model_folder(model)
    empty = meta_model(source)
    files = ModelFiles(source, empty)
    adapted = _adapted(empty, config)
    adapted.peft_config[ADAPTER].base_model_name_or_path = config.base_model_name_or_path or model
    layers = dict(adapted_layers(adapted, ADAPTER))
    _check_ranks(layers)
    files.check([f"{name}.weight" for name in layers])
    check_output(Path(folder))
    cache = start_cache(config.cache) if config.cache else None
    before = (cache.reused, cache.broken) if cache else (0, 0)
    with new_folder(Path(folder), START) as made:
        found = _write(made, adapted, layers, files, config, dtype, console)
    after = (cache.reused, cache.broken) if cache else (0, 0)
    return InitReport(
        ranks={name: one.rank for name, one in found.items()},
        energy={name: one.energy for name, one in found.items()},
        zero={name: one.zero for name, one in found.items() if one.zero},
        reused=after[0] - before[0],
        broken=after[1] - before[1],
        seconds=time.perf_counter() - started,
    )


class _Written(NamedTuple):
    """What is told of one module."""

    rank: int
    energy: float
    zero: int
    hash: str


def _write(
    folder: Path,
    adapted: PeftModel,
    layers: Mapping[str, LoraLayer],
    files: ModelFiles,
    config: MiloraConfig,
    dtype: torch.dtype,
    console: Console | None,
) -> dict[str, _Written]:
    """Fill the folder: the tensors one module after another, then the settings."""
    found = {}
    with (
        TensorFile(folder / "adapter_model.safetensors", _shapes(adapted), dtype) as file,
        closing(_shown(layers, console)) as shown,
    ):
        for name, layer in shown:
            weight = files.weight(f"{name}.weight")
            try:
                tensors, found[name] = _start(name, layer, weight, config)
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
            for key, value in tensors.items():
                file.write(key, value)
            return_free_memory()
    chosen = adapted.peft_config[ADAPTER]
    chosen.init_lora_weights, chosen.inference_mode = config.init_lora_weights, True
    chosen.base_hashes = {name: one.hash for name, one in found.items()}
    chosen.save_pretrained(folder)
    return found


def _shown(layers: Mapping[str, LoraLayer], console: Console | None) -> Generator[tuple[str, LoraLayer], None, None]:
    """The layers, with a bar; off the terminal, with a line for every tenth."""
    if console is None:
        yield from layers.items()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    total, started = len(layers), time.perf_counter()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("matrices", total=total)
        for number, item in enumerate(layers.items(), start=1):
            yield item
            bar.advance(task)
            if not console.is_terminal and 10 * number // total > 10 * (number - 1) // total:
                left = (time.perf_counter() - started) * (total / number - 1)
                say(console, f"{number}/{total} matrices, {left:.0f} s left")


def _check(folder: Path, config: MiloraConfig, dtype: torch.dtype) -> None:
    check_device(config.start_device)
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype} is not possible for A and B: take one of {', '.join(map(str, DTYPES))}")
    if config.use_dora and dtype.itemsize < 4:
        raise UserError(f"dtype {dtype} would round DoRA's magnitude, and with it the base: take torch.float32")
    if config.init_lora_weights is False:
        raise UserError("init_lora_weights=False asks for no start, and that is what is written here: leave it out")
    if config.layer_replication:
        raise UserError(
            "layer_replication repeats layers that the model's files hold once: load the model and use get_peft_model"
        )
    if (rank := min([config.r, *(config.rank_pattern or {}).values()])) < 1:
        raise UserError(f"rank {rank} is not possible: it must be 1 or more")
    check_replaceable(folder, START)


def _adapted(model: PreTrainedModel, config: MiloraConfig) -> PeftModel:
    """The model with PEFT's own choice of modules and ranks, all on the meta device."""
    blank = copy.copy(config)
    blank.init_lora_weights = False
    check_patterns(config.to_dict(), [name for name, _ in model.named_modules()])
    check_sizes(model, config.to_dict())
    try:
        adapted = peft.get_peft_model(model, blank, low_cpu_mem_usage=True)
    except UserError:
        raise
    except ValueError as error:  # PEFT's word for targets that match nothing, or that it cannot adapt
        raise UserError(f"target_modules {config.target_modules}: {error}") from error
    return adapted


def _check_ranks(layers: Mapping[str, LoraLayer]) -> None:
    """Refuse a rank above the smaller side of its weight before anything is read."""
    for name, layer in layers.items():
        b, a = factor_matrices(layer, ADAPTER)
        smaller = min(len(b), a.shape[1])
        if len(a) > smaller:
            raise UserError(f"{name}: rank {len(a)} of a weight whose smaller side is {smaller}: give a smaller rank")


def _shapes(adapted: PeftModel) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of the file, by PEFT's names."""
    found = {
        name: tuple(value.shape)
        for name, value in get_peft_model_state_dict(adapted, save_embedding_layers=False).items()
    }
    for name in found:
        if not name.endswith((*LINEAR, *EMBEDDING, MAGNITUDE)):
            raise UserError(f"a start holds no {name}: leave modules_to_save, bias and what else makes it out")
    return found


@torch.no_grad()
def _start(name: str, layer: LoraLayer, weight: Tensor, config: MiloraConfig) -> tuple[dict[str, Tensor], _Written]:
    """A layer's tensors by PEFT's names; the layer has values only for as long as this takes."""
    base = layer.get_base_layer()
    held, base.weight = base.weight, nn.Parameter(weight, requires_grad=False)
    for part in layer.adapter_layer_names:
        getattr(layer, part).to_empty(device=weight.device)
    zero = layer.lora_variant[ADAPTER].start(layer, ADAPTER, config)
    pair = live_pair(layer, ADAPTER)
    ends = EMBEDDING if ADAPTER in layer.lora_embedding_A else LINEAR
    tensors = dict(zip(ends, stack_pair(pair), strict=True))
    if ADAPTER in layer.lora_magnitude_vector:
        tensors[MAGNITUDE] = layer.lora_magnitude_vector[ADAPTER].weight.detach()
    written = _Written(len(pair.A), _energy(layer, weight), zero, weight_hash(weight) or "")
    for part in layer.adapter_layer_names:
        getattr(layer, part).to("meta")
    base.weight = held
    return {f"base_model.model.{name}.{end}": tensor for end, tensor in tensors.items()}, written


def _energy(layer: LoraLayer, weight: Tensor) -> float:
    """Share of the weight's squared norm in ``s B0 A0``, whose terms are orthogonal."""
    b, a = (factor.double() for factor in factor_matrices(layer, ADAPTER))
    held = layer.scaling[ADAPTER] * float((a.norm(dim=1) * b.norm(dim=0)).norm())
    whole = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
    return (held / whole) ** 2 if whole else 0.0
