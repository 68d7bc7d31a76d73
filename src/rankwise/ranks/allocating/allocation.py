"""Allocating LoRA: directions that matter little are cut, and layers that lose none get as many new ones.

"Allocating LoRA" is the method of Liu et al. 2024 (arXiv 2403.16187), which they call ALoRA; PEFT's ``alora`` is
another one. The adapter is plain LoRA at every moment: a direction is ablated by a column of zeros in B.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel
from jaxtyping import Bool, Float
from peft import LoraConfig, PeftType
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rankwise.errors import UserError
from rankwise.likelihood import evaluating
from rankwise.peft_bridge import active_adapter, adapted_layers
from rankwise.peft_bridge.matrices import factor_parameters, refusal
from rankwise.ranks.allocating.blocks import Blocks

logger = logging.getLogger(__name__)


class Move(NamedTuple):
    """Directions to cut, and as many to add elsewhere.

    Attributes:
        kept: for each layer that loses directions, which of them stay.
        added: for each layer that gets directions, how many.
    """

    kept: dict[str, Bool[Tensor, " rank"]]
    added: dict[str, int]


@torch.no_grad()
def importance(model: nn.Module, loss: Callable[[nn.Module], Tensor | float]) -> dict[str, Float[Tensor, " rank"]]:
    """Score each direction by ablation: ``loss(model without r) - loss(model with r alone)``.

    The paper's score is ``IS(r) = S(model) - S(model without r) + S(model with r alone)``, where S is minus the loss on
    a batch of validation rows. S(model) is the same for every direction and is left out: the order and the differences
    of scores are the paper's.

    Two forward passes a direction, and no gradient; where the model lets them, they begin at the block of the
    direction, with what the blocks before it gave. The model computes in evaluation mode and, where all of its weights
    are float32, without autocast: what most directions do to the loss is less than bfloat16's rounding. Afterwards its
    modes, its autocast and its B are what they were, bit for bit, also where ``loss`` raises.

    Args:
        model: a PEFT model whose active adapter is plain LoRA.
        loss: of a model, always on the same rows.

    Returns:
        For each adapted layer, by its name in the base model, a score of each direction; float64, larger is more
        important.

    Raises:
        UserError: the adapter is not plain LoRA (see :func:`check_adapter`), or a loss is not finite.

    Source: Allocating LoRA (arXiv 2403.16187), AB-LoRA. That "r alone" is the only direction left in the whole model,
    not in each layer, is how we read the paper.
    """
    adapter = check_adapter(model)
    layers = dict(adapted_layers(model, adapter))
    columns = {name: factor_parameters(layer, adapter)[1] for name, layer in layers.items()}
    trained = {name: b.detach().clone() for name, b in columns.items()}
    with evaluating(model), _without_autocast(model), _restored(columns, trained):
        blocks = Blocks(model, lambda: _finite(loss(model)))
        score = partial(_each, layers, columns, trained, lambda: _finite(loss(model)), blocks)
        without = score(alone=False)
        for b in columns.values():
            b.zero_()
        alone = score(alone=True)
    return {name: without[name] - alone[name] for name in columns}


def _each(
    layers: Mapping[str, LoraLayer],
    columns: Mapping[str, Tensor],
    trained: Mapping[str, Tensor],
    loss: Callable[[], float],
    blocks: Blocks,
    alone: bool,
) -> dict[str, Float[Tensor, " rank"]]:
    """The loss with each column of B in turn set to zero, or to its value."""
    found = {}
    places = {name: blocks.place(layer) for name, layer in layers.items()}
    with blocks.passed_over(), _silent(layers.values() if alone else ()):
        for name in sorted(columns, key=places.__getitem__):
            blocks.begin_at(places[name])
            b, losses = columns[name], []
            with _heard(layers[name]):
                for number in range(b.shape[1]):
                    column, value = b.select(1, number), trained[name].select(1, number)
                    column.copy_(value if alone else torch.zeros_like(value))
                    losses.append(loss())
                    column.copy_(torch.zeros_like(value) if alone else value)
            found[name] = torch.tensor(losses, dtype=torch.float64)
            way = "alone" if alone else "left out"
            logger.info("scoring directions, each %s: %d of %d layers", way, len(found), len(columns))
    return found


@contextmanager
def _silent(layers: Collection[LoraLayer]) -> Iterator[None]:
    """Adapters whose B is zero meanwhile are not computed.

    By the attribute behind PEFT's ``disable_adapters``: its ``enable_adapters`` would make all weights trainable again.
    """
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@contextmanager
def _heard(layer: LoraLayer) -> Iterator[None]:
    """The adapter of this one is computed."""
    before, layer._disable_adapters = layer._disable_adapters, False
    try:
        yield
    finally:
        layer._disable_adapters = before


def _finite(value: Tensor | float) -> float:
    if not math.isfinite(found := float(value)):
        raise UserError(
            f"the loss of the validation rows is {found}, so that directions cannot be compared: lower the learning "
            "rate, or look for rows without an answer"
        )
    return found


@contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    """Autocast is off meanwhile, also that which accelerate puts around a forward, if all weights are float32."""
    weights = [weight for weight in model.parameters() if weight.is_floating_point()]
    if any(weight.dtype != torch.float32 for weight in weights):
        yield
        return
    own = vars(model)
    kept: dict[str, Any] = {name: own[name] for name in ("forward", "_original_forward") if name in own}
    extract_model_from_parallel(model, keep_fp32_wrapper=False)
    try:
        with torch.autocast(weights[0].device.type, enabled=False):
            yield
    finally:
        own.pop("forward", None)
        own.update(kept)


@contextmanager
def _restored(columns: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> Iterator[None]:
    try:
        yield
    finally:
        for name, b in columns.items():
            b.copy_(trained[name])


def check_adapter(model: nn.Module) -> str:
    """The name of the active adapter, whose directions can be cut and grown with nothing else changing.

    Raises:
        UserError: it is not plain LoRA (gates, a frozen start, DoRA, AdaLoRA, ...), trains biases beside its
            directions, is merged or disabled, or a module has no directions that can be told apart.
    """
    adapter = active_adapter(model)
    config: LoraConfig = model.peft_config[adapter]  # type: ignore[index]
    if config.peft_type != PeftType.LORA:
        raise UserError(
            f"allocating LoRA moves directions of plain LoRA, and adapter {adapter!r} is {type(config).__name__}: make "
            "it with peft.LoraConfig"
        )
    if config.ensure_weight_tying:
        raise UserError(f"adapter {adapter!r} has ensure_weight_tying=True, and tied modules cannot have other ranks")
    if config.bias != "none" or config.lora_bias:
        raise UserError(
            f"adapter {adapter!r} trains biases (bias={config.bias!r}, lora_bias={config.lora_bias}), which would be "
            "lost with the last direction of a layer: leave them out"
        )
    for name, layer in adapted_layers(model, adapter):
        if (reason := refusal(layer)) is not None:
            raise UserError(f"{name}: its directions cannot be cut or added: {reason}")
        if layer.lora_variant.get(adapter) is not None:
            variant = type(layer.lora_variant[adapter]).__name__
            raise UserError(f"{name}: its update is one of {variant}, no plain sum of directions: use plain LoRA")
        if layer.merged or layer.disable_adapters:
            raise UserError(f"{name}: its adapter is {'merged' if layer.merged else 'disabled'}: undo that first")
    return adapter


def choose(scores: Mapping[str, Float[Tensor, " rank"]], count: int) -> Move:
    """Which directions to cut, and which layers get as many new ones; the sum of the ranks stays the same.

    The ``count`` directions of the lowest scores are cut. The new ones go to the layers that lose none, one each, round
    and round, those of the highest mean score first. The number of parameters changes where layers differ in size,
    since the paper's budget, as this one, counts directions. A layer may lose all of its directions; it then never gets
    one again, having no adapter. Nothing keeps a layer from growing beyond the smaller side of its weight.

    Our choice, where the paper does not say or we do not know it: the order among layers is that of the mean score over
    all directions of a layer; where every layer loses some, those that keep one get the new ones in the same order; of
    equal scores the direction that stands first is cut, of equal means the layer that stands first comes first.

    Args:
        scores: of each direction of each layer, finite, in the order of the layers.
        count: how many to cut, 1 or more and fewer than there are.

    Raises:
        UserError: another count.
    """
    total = sum(len(values) for values in scores.values())
    check_count(count, total)
    order = torch.cat(list(scores.values())).argsort(stable=True)
    stays = torch.ones(total, dtype=torch.bool).scatter(0, order[:count].cpu(), False)
    sizes = [len(values) for values in scores.values()]
    masks = dict(zip(scores, torch.split(stays, sizes), strict=True))
    receivers = [name for name, mask in masks.items() if mask.all()] or [name for name in masks if masks[name].any()]
    receivers.sort(key=lambda name: -float(scores[name].mean()))
    added = {name: len(range(place, count, len(receivers))) for place, name in enumerate(receivers)}
    return Move(
        {name: mask for name, mask in masks.items() if not mask.all()},
        {name: number for name, number in added.items() if number},
    )


def check_count(count: int, total: int) -> None:
    """Raise a ``UserError`` where so many directions cannot be moved."""
    if not 1 <= count < total:
        raise UserError(f"{count} of {total} directions cannot be moved: 1 or more, and fewer than there are, can")


def allocation_steps(total: int, events: int, first: float, last: float) -> tuple[int, ...]:
    """The optimizer steps after which directions are moved: ``events`` of them, evenly from a share to another.

    Args:
        total: steps of the training.
        events: how many times directions are moved.
        first: share of the training after which they are moved for the first time.
        last: the same for the last time; with a single event it is not used. One step at least comes after it.

    Raises:
        UserError: a value out of its range, or more events than steps between the two.
    """
    check_schedule(events, first, last)
    shares = [first + (last - first) * number / max(events - 1, 1) for number in range(events)]
    steps = sorted({min(max(round(total * share), 1), total - 1) for share in shares})
    if total < 2 or len(steps) < events:
        raise UserError(
            f"directions cannot be moved {events} times from {first} to {last} of a training of {total} steps: lower "
            "events, widen the shares or train longer"
        )
    return tuple(steps)


def check_schedule(events: int, first: float, last: float) -> None:
    """Raise a ``UserError`` where one is not possible: events of 1 or more, 0 <= first <= last < 1."""
    if events < 1:
        raise UserError(f"events {events} is not possible: it must be 1 or more")
    if not 0 <= first <= last < 1:
        raise UserError(f"first {first} and last {last} are not possible: 0 <= first <= last < 1 is needed")
