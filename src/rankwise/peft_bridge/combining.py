"""A weighted sum of adapters as one adapter of the same kind: exactly, or the best of a given rank."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from peft.tuners.lora.model import LoraModel
from torch import Tensor

from rankwise.errors import UserError, nearest
from rankwise.low_rank import Factors, balanced_svd, padded
from rankwise.peft_bridge import adapted_layers, matrix_factors

TYPES = ("cat", "svd")


@torch.no_grad()
def add_combined(
    tuner: LoraModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    kind: str,
    rank: int | None = None,
) -> None:
    """Add the adapter ``name`` whose update of each layer is ``sum_i weights_i update_i``.

    It has scaling 1, is not trained yet, and its frozen pair is zero (its gate one), so that A and B are all of it.
    What an adapter trained as whole modules or tokens has no sum here: a warning says that it is left out.

    Args:
        tuner: of the model.
        adapters: names; a layer that one of them lacks takes nothing from it.
        weights: one for each.
        name: of the new adapter.
        kind: ``cat``: the sum exactly, by stacked factors; ``svd``: its best approximation in the Frobenius norm.
        rank: of ``svd``; by default the largest rank of the adapters.

    Raises:
        UserError: another kind, an unknown adapter or one of DoRA, adapters that trained the same whole module, a name
            that is taken, or a rank below 1.
    """
    _check(tuner, adapters, weights, name, kind, rank)
    targets = _targets(tuner, adapters)
    _warn_of_left_out(tuner, adapters, name)
    parts = {
        layer_name: [
            (weight * layer.scaling[adapter], matrix_factors(layer, adapter, layer_name))
            for adapter, weight in zip(adapters, weights, strict=True)
            if adapter in layer.r
        ]
        for adapter in adapters
        for layer_name, layer in adapted_layers(tuner.model, adapter)
    }
    sums = {layer_name: _stacked(found) for layer_name, found in parts.items()}
    if kind == "svd":
        most = rank or max(
            layer.r[adapter] for adapter in adapters for _, layer in adapted_layers(tuner.model, adapter)
        )
        sums = {layer_name: _cut(*factors, most) for layer_name, factors in sums.items()}
    _add(tuner, adapters[0], name, targets, sums)


def _check(
    tuner: LoraModel, adapters: Sequence[str], weights: Sequence[float], name: str, kind: str, rank: int | None
) -> None:
    if kind not in TYPES:
        raise UserError(
            f"combination_type {kind!r} is not available: it combines A and B each for themselves, and the sum of "
            "updates is not their product; use cat (exact) or svd (of a given rank)"
        )
    if not adapters or len(adapters) != len(weights):
        raise UserError(
            f"{len(adapters)} adapters and {len(weights)} weights: give one or more adapters, each a weight"
        )
    for adapter in adapters:
        if adapter not in tuner.peft_config:
            raise UserError(f"adapter {adapter!r} is unknown: {nearest(adapter, list(tuner.peft_config))}")
    if name in tuner.peft_config:
        raise UserError(f"adapter {name!r} exists already: choose another name")
    if rank is not None and rank < 1:
        raise UserError(f"svd_rank {rank} is not possible: it must be 1 or more")


def _targets(tuner: LoraModel, adapters: Sequence[str]) -> set[str] | str:
    """What all of them adapt, as PEFT names it."""
    try:
        _, _, targets = tuner._check_add_weighted_adapter(list(dict.fromkeys(adapters)), "cat", None)
    except ValueError as error:  # of which two trained one whole module, or whose names are of different forms
        raise UserError(f"{', '.join(adapters)} have no sum: {error}") from error
    found: set[str] | str = targets
    return found


def _warn_of_left_out(tuner: LoraModel, adapters: Sequence[str], name: str) -> None:
    """Say which modules and tokens an adapter trained that the sum does not hold."""
    for adapter in dict.fromkeys(adapters):
        for setting in ("modules_to_save", "trainable_token_indices"):
            if found := getattr(tuner.peft_config[adapter], setting):
                warnings.warn(
                    f"{setting} of adapter {adapter!r} ({', '.join(map(str, dict.fromkeys(found)))}) are not summed: "
                    f"{name!r} has those of the base",
                    stacklevel=5,
                )


def _stacked(parts: Sequence[tuple[float, Factors]]) -> Factors:
    """Factors of the sum: the weights and scalings in B."""
    return (
        torch.cat([share * b for share, (b, _) in parts], dim=1),
        torch.cat([a for _, (_, a) in parts], dim=0),
    )


def _cut(b: Float[Tensor, "out k"], a: Float[Tensor, "k in"], rank: int) -> Factors:
    """The best product of this rank, each half with the root of the singular values."""
    u, s, vh = balanced_svd(b.double(), a.double())
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).to(b.dtype), (root[:, None] * vh[:rank]).to(a.dtype)


def _add(tuner: LoraModel, first: str, name: str, targets: set[str] | str, sums: Mapping[str, Factors]) -> None:
    """Inject the adapter and fill it; a layer of less rank gets zero rows and columns."""
    rank = max(a.shape[0] for _, a in sums.values())
    config = dataclasses.replace(
        tuner.peft_config[first],
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        target_modules=targets,
        rank_pattern={},
        alpha_pattern={},
        init_lora_weights=False,
    )
    tuner.peft_config[name] = config
    try:
        tuner.inject_adapter(tuner.model, name)
    except BaseException:
        del tuner.peft_config[name]
        raise
    for layer_name, layer in adapted_layers(tuner.model, name):
        layer.lora_variant[name].set_update(layer, name, *padded(*sums[layer_name], rank))
        for held in (layer.lora_A, layer.lora_B, layer.lora_embedding_A, layer.lora_embedding_B):
            if name in held:
                held[name].requires_grad_(False)
