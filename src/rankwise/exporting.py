"""Ship an adapter: any trained adapter as a plain LoRA on the original base, or as merged weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.errors import UserError, nearest
from rankwise.files import new_folder
from rankwise.peft_bridge import (
    active_adapter,
    adapted_layers,
    base_modules,
    low_rank_factors,
    pattern_keys,
    target_modules,
)

Layout = Literal["uniform", "compact", "merged"]
Factors = tuple[Tensor, Tensor]

# What PEFT calls the starts that change the base weights.
CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        ranks: rank of each layer's update as written, before padding; layers whose update is zero are left out (but for
            one, where all are zero).
        relative_error: Frobenius norm of all that was cut off, over that of the whole update; 0 to 1.
        parameters: numbers in the written low-rank factors, padding included; of the whole model for ``merged``.
    """

    ranks: dict[str, int]
    relative_error: float
    parameters: int


def export(
    model: nn.Module,
    folder: str | Path,
    rank: int | None = None,
    energy: float | None = None,
    layout: Layout = "uniform",
) -> ExportReport:
    """Write the active adapter as a plain LoRA, which loads with peft on the untouched base.

    Each layer's update ``s B A`` (for MiLoRA ``s [B, -B0] [A; A0]``) goes through a thin QR of both factors and the
    SVD of the small product, in float64, and is written as ``B' A'`` with ``B' = U sqrt(S)``, ``A' = sqrt(S) Vh`` and
    scaling 1.

    Args:
        model: a PEFT model with one active LoRA, MiLoRA or SoRA adapter (or any LoRA variant of low rank).
        folder: new, empty or an earlier export, which is replaced in one step when all is written.
        rank: the largest rank to keep in each layer; all of the update's own rank where it is not given.
        energy: keep the fewest directions that hold this share of the squared norm; above 0, at most 1.
        layout: ``uniform`` (one rank, zero-padded, alpha = rank: computes the same in PEFT, vLLM and llama.cpp),
            ``compact`` (each layer its rank, by ``rank_pattern``; smaller, for PEFT) or ``merged`` (the whole model).

    Returns:
        The ranks, the relative error and the number of parameters.

    Raises:
        UserError: no adapter, an unknown layout, a rank or energy out of range, a folder that holds something else, an
            update that is not finite or not of low rank, or an adapter whose start changed the base.
    """
    _check(rank, energy, layout, Path(folder))
    adapter = active_adapter(model)
    assert isinstance(model, PeftModel)
    if layout == "merged":
        return _export_merged(model, adapter, Path(folder))
    _check_start(model.peft_config[adapter])
    updates = _updates(model, adapter)
    spectra = {name: _balanced(b, a) for name, (b, a) in updates.items()}
    chosen = {name: _rank(s, rank, energy) for name, (_, s, _) in spectra.items()}
    if model.peft_config[adapter].bias != "none":  # a layer's trained bias is written under its adapter's name
        chosen = {name: max(count, 1) for name, count in chosen.items()}
    chosen = {name: count for name, count in chosen.items() if count} or {next(iter(updates)): 1}
    factors = {name: _pad(*_cut(*spectra[name], count), count) for name, count in chosen.items()}
    whole = sum(float(s.square().sum()) for _, s, _ in spectra.values())
    lost = sum(float(s[chosen.get(name, 0) :].square().sum()) for name, (_, s, _) in spectra.items())
    if layout == "uniform":
        factors = {name: _pad(b, a, max(chosen.values())) for name, (b, a) in factors.items()}
    _write(model, adapter, factors, Path(folder))
    parameters = sum(b.numel() + a.numel() for b, a in factors.values())
    return ExportReport(chosen, (lost / whole) ** 0.5 if whole else 0.0, parameters)


def _check(rank: int | None, energy: float | None, layout: str, folder: Path) -> None:
    if layout not in get_args(Layout):
        raise UserError(f"layout {layout!r} is unknown: {nearest(layout, get_args(Layout))}")
    if rank is not None and rank < 1:
        raise UserError(f"rank {rank} is not possible: it must be 1 or more")
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"energy {energy} is not possible: it is a share, above 0 and at most 1")
    if layout == "merged" and (rank is not None or energy is not None):
        raise UserError("layout 'merged' holds the whole update: leave rank and energy out, or take another layout")
    mark = "config.json" if layout == "merged" else "adapter_config.json"
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / mark).is_file()):
        raise UserError(f"{folder} holds something other than an earlier export: give a new folder")


def _check_start(config: PeftConfig) -> None:
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start.startswith(CHANGING_STARTS):
        raise UserError(
            f"an adapter with init_lora_weights={start!r} stands on base weights that it changed, not on the original: "
            "write it with layout='merged'"
        )


def _updates(model: PeftModel, adapter: str) -> dict[str, Factors]:
    """Factors of each layer's update in float64, with the scaling in B."""
    found = {}
    for name, layer in adapted_layers(model, adapter):
        b, a = low_rank_factors(layer, adapter, name)
        if not (torch.isfinite(b).all() and torch.isfinite(a).all()):
            raise UserError(f"{name}: the adapter holds NaN or infinity: go back to an earlier checkpoint")
        found[name] = (b.double() * layer.scaling[adapter], a.double())
    if not found:
        raise UserError(f"adapter {adapter!r} has no LoRA layers: only LoRA and its kin can be exported")
    return found


def _balanced(
    b: Float[Tensor, "out k"], a: Float[Tensor, "k in"]
) -> tuple[Float[Tensor, "out q"], Float[Tensor, " q"], Float[Tensor, "q in"]]:
    """SVD of ``b @ a`` by thin QR of both factors and the SVD of the small product."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, s, vh @ q_a.T


def _rank(s: Float[Tensor, " q"], rank: int | None, energy: float | None) -> int:
    """Directions to keep: those above rounding, then by energy, then by rank."""
    if not len(s) or s[0] == 0:
        return 0
    count = int((s > s[0] * 1e-9).sum())
    if energy is not None:
        shares = s.square().cumsum(0) / s.square().sum()
        count = min(count, int((shares < energy - 1e-12).sum()) + 1)
    return count if rank is None else min(count, rank)


def _cut(u: Float[Tensor, "out q"], s: Float[Tensor, " q"], vh: Float[Tensor, "q in"], rank: int) -> Factors:
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).float(), (root[:, None] * vh[:rank]).float()


def _pad(b: Float[Tensor, "out k"], a: Float[Tensor, "k in"], rank: int) -> Factors:
    more = rank - b.shape[1]
    return nn.functional.pad(b, (0, more)), nn.functional.pad(a, (0, 0, 0, more))


def _write(model: PeftModel, adapter: str, factors: Mapping[str, Factors], folder: Path) -> None:
    """Write config and tensors in PEFT's own form."""
    layers = dict(adapted_layers(model, adapter))
    tensors = _other_tensors(model, adapter)
    for name, (b, a) in factors.items():
        prefix = f"base_model.model.{name}"
        if adapter in layers[name].lora_embedding_A:
            tensors |= {f"{prefix}.lora_embedding_A": a, f"{prefix}.lora_embedding_B": b}
        else:
            tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    with new_folder(folder) as made:
        _config(model, adapter, factors).save_pretrained(made)
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            made / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )


def _other_tensors(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """What was trained beside the low-rank factors: whole modules (a classifier's head) and biases."""
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return {name: tensor.clone() for name, tensor in state.items() if ".lora_" not in name}


def _config(model: PeftModel, adapter: str, factors: Mapping[str, Factors]) -> LoraConfig:
    """A plain LoRA config with scaling 1 everywhere."""
    trained: LoraConfig = model.peft_config[adapter]
    ranks = {name: b.shape[1] for name, (b, _) in factors.items()}
    largest = max(ranks.values())
    keys = pattern_keys(model, ranks)
    uneven = {keys[name]: rank for name, rank in ranks.items() if rank != largest}
    return LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=uneven,
        alpha_pattern=dict(uneven),
        target_modules=_target_modules(model, set(factors)),
        task_type=trained.task_type,
        modules_to_save=trained.modules_to_save,
        trainable_token_indices=trained.trainable_token_indices,
        layer_replication=trained.layer_replication,
        fan_in_fan_out=trained.fan_in_fan_out,
        bias=trained.bias,
        base_model_name_or_path=trained.base_model_name_or_path,
        inference_mode=True,
    )


def _target_modules(model: PeftModel, names: set[str]) -> list[str] | str:
    """The modules' last names where these mean just these modules, else their full names."""
    short = {name.rpartition(".")[2] for name in names}
    meant = {name for name, _ in base_modules(model) if name.rpartition(".")[2] in short}
    found = short if meant == names else target_modules(model, names)
    return found if isinstance(found, str) else sorted(found)


def _export_merged(model: PeftModel, adapter: str, folder: Path) -> ExportReport:
    """Write the whole model with the update added to a copy of its weights."""
    if not isinstance(model.get_base_model(), PreTrainedModel):
        kind = type(model.get_base_model()).__name__
        raise UserError(f"layout 'merged' writes models of transformers, not {kind}: merge and save it yourself")
    ranks = {name: layer.r[adapter] for name, layer in adapted_layers(model, adapter)}
    merged = copy.deepcopy(model).merge_and_unload()
    with new_folder(folder) as made:
        merged.save_pretrained(made)
    return ExportReport(ranks, 0.0, sum(p.numel() for p in merged.parameters()))
