"""Ship an adapter: any trained adapter as a plain LoRA on the original base, or as merged weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from rankwise.errors import UserError, nearest
from rankwise.exporting.merged import check_mergeable, write_merged
from rankwise.exporting.plain_lora import EXPORT, write_plain_lora
from rankwise.files import check_output, check_replaceable, new_folder
from rankwise.low_rank import Factors, Loss, balanced_svd, distance, halves, kept_rank, padded
from rankwise.peft_bridge import active_adapter, adapted_layers, adapter_state, matrix_factors
from rankwise.processes import held_whole

Layout = Literal["uniform", "compact", "own", "merged"]

# What PEFT calls the starts that change the base weights, in small letters.
CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        ranks: rank of each layer's update as written, before padding; layers whose update is zero are left out (but for
            one, where all are zero). For ``merged`` the rank of each update before it was rounded; of one that is no
            product of two small matrices (DoRA's), the smaller side of its weight.
        relative_error: Frobenius norm of what the written updates lack of the trained ones, over that of the trained;
            the cut and the rounding of the file's numbers both count. 0 to 1 for a cut.
        parameters: numbers in the written low-rank factors, padding included; of the whole model for ``merged``.
        module_errors: the same relative error for each layer's own update; 0 where the update is zero.
    """

    ranks: dict[str, int]
    relative_error: float
    parameters: int
    module_errors: dict[str, float] = field(default_factory=dict)

    def worst(self, count: int = 3) -> list[tuple[str, float]]:
        """The layers of the largest errors, the largest first."""
        return sorted(self.module_errors.items(), key=lambda item: -item[1])[:count]


@dataclass(frozen=True)
class Written:
    """One layer's update as it is to be written: its factors, its rank before padding, and what it lacks."""

    factors: Factors
    rank: int
    loss: Loss


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
    scaling 1. The error is measured on the float32 numbers that are written.

    Args:
        model: a PEFT model with one active LoRA, MiLoRA or SoRA adapter (or any LoRA variant of low rank); of any other
            method for ``own``, and of one that merges for ``merged``.
        folder: new, empty or an earlier export, which is replaced in one step when all is written.
        rank: the largest rank to keep in each layer; all of the update's own rank where it is not given.
        energy: keep the fewest directions that hold this share of the squared norm; above 0, at most 1.
        layout: ``uniform`` (one rank, zero-padded, alpha = rank: computes the same in PEFT, vLLM and llama.cpp),
            ``compact`` (each layer its rank, by ``rank_pattern``: smaller, for PEFT and vLLM; llama.cpp multiplies a
            layer of smaller rank by the largest rank over its own), ``own`` (as PEFT's ``save_pretrained`` writes the
            method, whichever it is) or ``merged`` (the whole model, each weight in the base's own dtype; memory holds
            the model and a few copies of one weight).

    Returns:
        The ranks, the relative error of the whole and of each layer, and the number of parameters.

    Raises:
        UserError: what :func:`check_export` refuses, no adapter, an update that is not finite, or one that the layout
            cannot hold (DoRA's or a changed base in ``uniform`` and ``compact``, a quantised or offloaded base in
            ``merged``).
    """
    check_export(rank, energy, layout, Path(folder))
    adapter = active_adapter(model)
    assert isinstance(model, PeftModel)
    layers = dict(adapted_layers(model, adapter))
    for name, layer in layers.items():
        _check_finite(layer, adapter, name)
    if layout == "own":
        return _export_own(model, adapter, Path(folder))
    if layout == "merged":
        return _export_merged(model, adapter, Path(folder))
    if not layers:
        kind = type(model.peft_config[adapter]).__name__
        raise UserError(
            f"adapter {adapter!r} ({kind}) has no LoRA layers, and no form as plain LoRA: write it with layout='own', "
            "or 'merged' where the method merges"
        )
    _check_starts(model.peft_config)
    _check_dora(model.peft_config[adapter])
    for name, layer in layers.items():  # what has no plain form is told before the first decomposition
        _check_plain(layer, adapter, name)
    least = 0 if model.peft_config[adapter].bias == "none" else 1  # a bias is written under its adapter's name
    written = {name: _compress(layer, adapter, name, rank, energy, least) for name, layer in layers.items()}
    factors = _factors(written, layout)
    write_plain_lora(model, adapter, factors, Path(folder))
    parameters = sum(b.numel() + a.numel() for b, a in factors.values())
    ranks = {name: max(written[name].rank, 1) for name in factors}
    return _report(ranks, {name: one.loss for name, one in written.items()}, parameters)


def check_export(rank: int | None, energy: float | None, layout: str, folder: Path) -> None:
    """Refuse what :func:`export` could not do with any adapter.

    Raises:
        UserError: an unknown layout, a rank or energy out of range or beside a layout that holds all, or a folder that
            holds something else or cannot be made.
    """
    if layout not in get_args(Layout):
        raise UserError(f"layout {layout!r} is unknown: {nearest(layout, get_args(Layout))}")
    if rank is not None and rank < 1:
        raise UserError(f"rank {rank} is not possible: it must be 1 or more")
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"energy {energy} is not possible: it is a share, above 0 and at most 1")
    if layout in ("own", "merged") and (rank is not None or energy is not None):
        raise UserError(f"layout {layout!r} holds the whole update: leave rank and energy out, or take another layout")
    check_replaceable(folder, EXPORT)
    check_output(folder)


def _check_starts(configs: Mapping[str, PeftConfig]) -> None:
    """Refuse a base that one of its adapters changed, on which all of them stand."""
    for name, config in configs.items():
        start = getattr(config, "init_lora_weights", True)
        if str(start).lower().startswith(CHANGING_STARTS):
            raise UserError(
                f"adapter {name!r} with init_lora_weights={start!r} changed the base weights, and the model's adapters "
                "stand on those, not on the original: write it with layout='merged'"
            )


def _check_dora(config: PeftConfig) -> None:
    if getattr(config, "use_dora", False):
        raise UserError(
            "an adapter with use_dora=True is no product of two small matrices, which is all that plain LoRA holds: "
            "write it with layout='merged', or ship the folder of save_pretrained, which is PEFT's own DoRA"
        )


def _check_finite(layer: LoraLayer, adapter: str, name: str) -> None:
    for kind in layer.adapter_layer_names:
        held = getattr(layer, kind)
        if adapter not in held:
            continue
        state = [held[adapter]] if isinstance(held[adapter], Tensor) else held[adapter].state_dict().values()
        if not all(torch.isfinite(tensor).all() for tensor in state):
            raise UserError(f"{name}: the adapter holds NaN or infinity: go back to an earlier checkpoint")


def _check_plain(layer: LoraLayer, adapter: str, name: str) -> None:
    if getattr(layer.get_base_layer(), "groups", 1) > 1:
        raise UserError(f"{name}: a convolution of several groups is no single matrix: leave it out of target_modules")
    matrix_factors(layer, adapter, name)


def _update(layer: LoraLayer, adapter: str, name: str) -> Factors:
    """Factors of a layer's update in float64, with the scaling in B."""
    b, a = matrix_factors(layer, adapter, name)
    return b.double() * layer.scaling[adapter], a.double()


def _compress(layer: LoraLayer, adapter: str, name: str, rank: int | None, energy: float | None, least: int) -> Written:
    """A layer's update cut to the wanted rank and measured; where nothing is left, one direction of zeros."""
    update = _update(layer, adapter, name)
    u, s, vh = balanced_svd(*update)
    kept = max(kept_rank(s, rank, energy), least)
    factors = padded(*halves(u, s, vh, kept), max(kept, 1))
    return Written(factors, kept, Loss(float(torch.linalg.norm(s)), distance(update, factors)))


def _factors(written: Mapping[str, Written], layout: Layout) -> dict[str, Factors]:
    """The factors of all layers that have an update, of one layer where none has; padded where the rank is to be one.

    PEFT loads no adapter without a layer.
    """
    kept = {name: one for name, one in written.items() if one.rank} or dict(list(written.items())[:1])
    largest = max(one.factors[0].shape[1] for one in kept.values())
    return {name: padded(*one.factors, largest) if layout == "uniform" else one.factors for name, one in kept.items()}


def _export_own(model: PeftModel, adapter: str, folder: Path) -> ExportReport:
    """Write the adapter as PEFT saves it."""
    with new_folder(folder, EXPORT) as made:
        model.save_pretrained(made, selected_adapters=[adapter], state_dict=held_whole(model))
    state = adapter_state(model, adapter)
    return ExportReport({}, 0.0, sum(tensor.numel() for tensor in state.values()))


def _export_merged(model: PeftModel, adapter: str, folder: Path) -> ExportReport:
    """Write the whole model with the update added to its weights."""
    check_mergeable(model, adapter)
    ranks = {name: _own_rank(layer, adapter, name) for name, layer in adapted_layers(model, adapter)}
    with new_folder(folder, EXPORT) as made:
        losses, parameters = write_merged(model, adapter, made)
    return _report({name: rank for name, rank in ranks.items() if rank}, losses, parameters)


def _own_rank(layer: LoraLayer, adapter: str, name: str) -> int:
    try:
        return kept_rank(balanced_svd(*_update(layer, adapter, name))[1])
    except UserError:  # no product of two small matrices: merging needs none
        weight = layer.get_base_layer().weight
        return min(int(weight.shape[0]), int(weight[0].numel()))


def _report(ranks: dict[str, int], losses: Mapping[str, Loss], parameters: int) -> ExportReport:
    whole = sum(loss.norm**2 for loss in losses.values())
    lost = sum(loss.lost**2 for loss in losses.values())
    errors = {name: loss.relative for name, loss in losses.items()}
    return ExportReport(ranks, (lost / whole) ** 0.5 if whole else 0.0, parameters, errors)
