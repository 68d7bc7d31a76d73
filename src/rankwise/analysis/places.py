"""Where updates lie in the weights that they change: module by module, and by kinds of modules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor

from rankwise.analysis.ranks import kind_names, split_module
from rankwise.analysis.spectra import effective_rank
from rankwise.analysis.weight_updates import Update, weight_updates
from rankwise.errors import UserError
from rankwise.low_rank import balanced_svd, product_norm

EXAMINED, LEAST = 10, 0.5  # of intruders: the largest directions that are looked at, and the cosine of an old one
POINTS = 33  # of a spectrum that are kept, at most
SHARES = ("top", "middle", "bottom")


@torch.no_grad()
def update_place(weight: Float[Tensor, "m n"], update: Update, rank: int) -> dict[str, Any]:
    """Where an update D lies in a weight W, by the singular vectors of both.

    Computed in float32 (float64 for a float64 weight, and for an update that is a product) on the weight's device; W
    is decomposed once, D too where it is one matrix, and of W + D the smaller Gram matrix.

    Args:
        weight: W, before training.
        update: D (m, n), or B (m, r) and A (r, n) with D = B A, the scaling in B.
        rank: directions of each part of W's spectrum; cut to a third of W's smaller side.

    Returns:
        ``norm`` of D and ``relative``, over that of W; ``effective_rank`` of D; ``top``, ``middle`` and ``bottom``, the
        shares of D's squared norm within ``rank`` directions of W's spectrum each, and ``chance``, that of a random D,
        rank^2 / (m n); ``amplification``, ``||D'|| / ||U^T W V||`` with D's own main directions, D' being D in them
        (inf where W has nothing there); ``intruders`` among the 10 largest left directions of W + D; ``rank``, as cut;
        ``spectra``, some singular values of W (``weight``) and of D (``update``) with their places, from 1.

    Raises:
        UserError: W or D is zero, or D is not finite.

    Source: see :mod:`rankwise.analysis.spectra` and :mod:`rankwise.analysis.updates`, which have each measure alone.
    """
    base = weight if weight.dtype == torch.float64 else weight.float()
    if isinstance(update, Tensor):
        u, s, vh = torch.linalg.svd(update.to(base), full_matrices=False)
    else:
        u, s, vh = balanced_svd(*(factor.to(base.device, torch.float64) for factor in update))
    b, a = (u * s).to(base), vh.to(base)  # rounded after MiLoRA's two products were subtracted, not before
    norm, whole = float(torch.linalg.norm(s)), float(torch.linalg.norm(base))
    if whole == 0:
        raise UserError("the weight is zero: an update lies nowhere in it")
    if not math.isfinite(norm) or norm == 0:
        raise UserError("the update is zero or not finite: there is nothing to look at")
    rank = max(1, min(rank, min(base.shape) // 3))
    left, values, right = torch.linalg.svd(base, full_matrices=False)
    inside = (left.T @ b) @ (a @ right.T)  # D in W's own directions
    middle = (len(inside) - rank) // 2
    parts = {"top": slice(rank), "middle": slice(middle, middle + rank), "bottom": slice(-rank, None)}
    shares = {name: float(inside[part, part].square().sum()) / norm**2 for name, part in parts.items()}
    own = min(rank, int((s > s[0] * 1e-6).sum()))
    in_its_directions = float(torch.linalg.norm(u[:, :own].to(base).T @ base @ a[:own].T))
    after = _largest_left(torch.addmm(base, b, a), EXAMINED)
    intruders = int(((left.T @ after).abs().amax(dim=0) < LEAST).sum())
    return {
        "norm": norm,
        "relative": norm / whole,
        "effective_rank": effective_rank(s),
        **shares,
        "chance": rank**2 / base.numel(),
        "amplification": float(torch.linalg.norm(s[:own])) / in_its_directions if in_its_directions else math.inf,
        "intruders": intruders,
        "rank": rank,
        "spectra": {"weight": sampled(values), "update": sampled(s)},
    }


def _largest_left(matrix: Float[Tensor, "m n"], count: int) -> Float[Tensor, "m k"]:
    """The left singular vectors of the largest singular values, from the eigenvectors of the smaller Gram matrix."""
    tall = matrix.shape[0] > matrix.shape[1]
    gram = (matrix.T @ matrix if tall else matrix @ matrix.T).double()
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -count:].flip(1).to(matrix)
    return torch.nn.functional.normalize(matrix @ vectors, dim=0) if tall else vectors


def sampled(values: Float[Tensor, " k"]) -> list[tuple[int, float]]:
    """Some of a falling spectrum's values with their places, from 1: the first, the last, and evenly on a log scale."""
    places = sorted({round(len(values) ** (point / (POINTS - 1))) for point in range(POINTS)})
    return [(place, float(values[place - 1])) for place in places]


def update_places(model: PeftModel, rank: int = 16) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """:func:`update_place` of each module that LoRA's kin, VeRA or full fine-tuning changed, and what was passed over.

    Args:
        model: with its adapter.
        rank: directions of each part of a weight's spectrum.

    Returns:
        A row for each module, with its name as ``module``, and counts of modules whose update or weight is zero,
        or whose update is read neither as a product of two small matrices nor as one matrix.

    Raises:
        UserError: no module has an update to look at.
    """
    rows, counts = [], {"modules without an update": 0, "modules of another form": 0, "modules whose weight is zero": 0}
    for name, weight, update in weight_updates(model):
        if update is None or weight is None:
            counts["modules of another form"] += 1
        elif is_zero(update):
            counts["modules without an update"] += 1
        elif not weight.any():
            counts["modules whose weight is zero"] += 1
        else:
            rows.append({"module": name, **update_place(weight, update, rank)})
    if not rows:
        raise UserError(
            "no module of the model has an update to look at: train one of LoRA's kind, VeRA, or all weights"
        )
    return rows, {name: count for name, count in counts.items() if count}


def is_zero(update: Update) -> bool:
    """Whether nothing was changed."""
    return not (update.any() if isinstance(update, Tensor) else product_norm(*update))


def places_by_kind(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over the layers, for each kind of module, and over all modules; of the amplification the geometric one."""
    kinds = kind_names(rows)
    groups = {name: [row for row in rows if split_module(row["module"])[1] == kind] for kind, name in kinds.items()} | {
        "all": list(rows)
    }
    return [{"kind": name, "modules": len(found), **dict(_means(found))} for name, found in groups.items()]


def places_over_all(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | int | None]:
    """Means over all modules, with their number and the directions of a part; None for an amplification without end."""
    whole = places_by_kind(rows)[-1]
    amplification = whole["amplification"] if math.isfinite(whole["amplification"]) else None
    means = {name: whole[name] for name in ("modules", "relative", "effective_rank", *SHARES, "chance", "intruders")}
    return means | {"amplification": amplification, "rank": max(row["rank"] for row in rows)}


def spectra_by_kind(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """For each kind, means over the layers of the spectra of ``weight`` and ``update``, at places that all have."""
    found = {}
    for kind, name in kind_names(rows).items():
        own = [row["spectra"] for row in rows if split_module(row["module"])[1] == kind]
        found[name] = {side: _mean_spectrum([one[side] for one in own]) for side in ("weight", "update")}
    return found


def _mean_spectrum(spectra: Sequence[Sequence[Sequence[int | float]]]) -> list[tuple[int, float]]:
    values = [{int(place): value for place, value in spectrum} for spectrum in spectra]
    shared = sorted(set.intersection(*map(set, values)))
    return [(place, fmean(one[place] for one in values)) for place in shared]


def _means(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    found = list(rows)
    for name in ("relative", "effective_rank", *SHARES, "chance", "intruders"):
        yield name, fmean(row[name] for row in found)
    known = [row["amplification"] for row in found if row["amplification"] is not None]  # None: inf, as JSON has it
    finite = [value for value in known if math.isfinite(value)]
    yield "amplification", math.exp(fmean(map(math.log, finite))) if finite else math.inf
