"""Change the ranks of a live adapter, between two optimizer steps: factors, gates, config and the optimizer's state."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.optim import Optimizer

from rankwise.directions.variants import START
from rankwise.errors import UserError, nearest
from rankwise.peft_bridge import active_adapter, adapted_layers, pattern_keys, target_modules
from rankwise.peft_bridge.matrices import factor_parameters, in_embedding, note_rank, refusal, set_values

GATE = "lora_gate"


class Held(NamedTuple):
    """A tensor of one adapter in one layer, and the axis that counts its directions."""

    tensor: Tensor
    axis: int


@torch.no_grad()
def resize_adapter(
    model: nn.Module,
    kept: Mapping[str, Bool[Tensor, " rank"]],
    added: Mapping[str, int] | None = None,
    optimizer: Optimizer | None = None,
    adapter: str | None = None,
) -> tuple[str, ...]:
    """Cut directions out of an adapter, and add new ones, which change nothing yet.

    A new direction is as LoRA starts it, and has a gate of one where there are gates: a row of A that is uniform with
    variance 1 / (3 in) and a column of zeros in B; of an embedding, a row of zeros in A and a column of B that is
    standard normal. Each layer keeps its scaling. A layer left without a direction loses its adapter
    and computes its base again. The config's ``rank_pattern``, ``alpha_pattern`` and ``target_modules`` follow, so that
    the adapter saves and loads as usual. Parameters stay the same objects, so an optimizer goes on with them.

    Args:
        model: a PEFT model with one active adapter of LoRA or SoRA.
        kept: for each layer to change, by its name in the base model, which directions stay.
        added: how many directions a layer gets; it need not be in ``kept``.
        optimizer: whose state is cut with the parameters; left alone where it is not given. New entries are zero, while
            a count of steps stays that of the whole parameter: Adam's first steps of a new direction are larger than
            its learning rate, by up to 6.6 times at the usual betas.
        adapter: its name; the active one where it is not given.

    Returns:
        Names of the layers whose adapter was removed.

    Raises:
        UserError: there is no such layer, or not of as many directions; a layer is merged, is of a kind whose
            directions cannot be told apart, has no way to grow, or is the last one and would be removed; or the
            optimizer keeps a state that cannot be cut. Nothing was changed then.
    """
    adapter = active_adapter(model) if adapter is None else adapter
    layers = dict(adapted_layers(model, adapter))
    more = dict(added or {})
    masks = {name: torch.ones(layer.r[adapter], dtype=torch.bool) for name, layer in layers.items() if name in more}
    masks |= {name: mask.detach().cpu() for name, mask in kept.items()}
    _check_names(layers, adapter, masks, more)
    if model.peft_config[adapter].ensure_weight_tying:  # type: ignore[union-attr, index]
        raise UserError(
            "ensure_weight_tying=True shares factors between modules, whose ranks cannot differ: leave it out"
        )
    left = {name: int(mask.sum()) + more.get(name, 0) for name, mask in masks.items()}
    _check(layers, adapter, masks, more, optimizer)
    removed = tuple(name for name, rank in left.items() if not rank)
    if len(removed) == len(layers):
        raise UserError("every layer would lose its adapter, and PEFT needs one that has it: keep one direction")
    for name, mask in masks.items():
        _resize_layer(layers[name], adapter, mask, more.get(name, 0), optimizer)
    for name in removed:
        remove_from_layer(model, name, adapter)
    forget_empty(optimizer)
    update_config(model, adapter)
    return removed


def directions(layer: LoraLayer, adapter: str) -> list[Held]:
    """What a layer keeps for each direction of an adapter: A, B, the gate and the frozen pair, if it has them."""
    a, b = factor_parameters(layer, adapter)
    found = [Held(a, 0), Held(b, 1)]
    if adapter in getattr(layer, GATE, {}):
        found.append(Held(getattr(layer, GATE)[adapter], 0))
    if adapter in getattr(layer, START, {}):
        pair = getattr(layer, START)[adapter]
        found += [Held(pair.A, 0), Held(pair.B, 1)]
    return found


def _check_names(
    layers: Mapping[str, LoraLayer], adapter: str, masks: Mapping[str, Tensor], more: Mapping[str, int]
) -> None:
    for name in (*masks, *more):
        if name not in layers:
            raise UserError(f"layer {name!r} has no adapter {adapter!r}: {nearest(name, layers)}")
    for name, mask in masks.items():
        if len(mask) != layers[name].r[adapter]:
            raise UserError(
                f"{name}: {len(mask)} values say which directions stay, and there are {layers[name].r[adapter]}: give "
                "one for each"
            )
        if more.get(name, 0) < 0:
            raise UserError(f"{name}: {more[name]} directions cannot be added: give 0 or more")


def _check(
    layers: Mapping[str, LoraLayer],
    adapter: str,
    masks: Mapping[str, Tensor],
    more: Mapping[str, int],
    optimizer: Optimizer | None,
) -> None:
    for name, mask in masks.items():
        layer = layers[name]
        if (reason := refusal(layer)) is not None:
            raise UserError(f"{name}: its directions cannot be cut or added: {reason}")
        if layer.merged:
            raise UserError(
                f"{name}: {', '.join(layer.merged_adapters)} is merged into its weight, and directions cannot be cut "
                "then: call unmerge_adapter() first, and merge when training has ended"
            )
        if more.get(name) and adapter in getattr(layer, START, {}):
            raise UserError(f"{name}: an adapter that starts from a part of the spectrum has no further directions")
        if optimizer is not None and (more.get(name) or (mask.any() and not mask.all())):
            for tensor, axis in directions(layer, adapter):
                check_state(optimizer, tensor, axis, name)


def check_state(optimizer: Optimizer, parameter: Tensor, axis: int, name: str) -> None:
    """Raise a ``UserError`` where the optimizer keeps something for ``parameter`` that cannot be cut by direction."""
    for key, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, Tensor) and value.ndim and not _follows(value, parameter, axis):
            raise UserError(
                f"{name}: {type(optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} for a parameter of "
                f"shape {tuple(parameter.shape)}, which cannot be cut by direction: leave the ranks as they are "
                "while training, or take an optimizer such as torch.optim.AdamW"
            )


def _follows(value: Tensor, parameter: Tensor, axis: int) -> bool:
    """Whether a tensor of the optimizer's state has an entry for each direction, or one for all of them.

    Of a single direction the two look alike; there only what has the parameter's own shape is known to follow, and of
    an optimizer that keeps other shapes (Adafactor's sums of rows) not even that.
    """
    if parameter.shape[axis] == 1:
        return value.shape == parameter.shape
    return value.ndim == parameter.ndim and value.shape[axis] in (1, parameter.shape[axis])


def _resize_layer(layer: LoraLayer, adapter: str, mask: Tensor, more: int, optimizer: Optimizer | None) -> None:
    rank = int(mask.sum()) + more
    for number, (tensor, axis) in enumerate(directions(layer, adapter)):
        index = mask.nonzero().flatten().to(tensor.device)
        kept = tensor.index_select(axis, index)
        part = ("A", "B", "gate")[min(number, 2)]
        values = torch.cat([kept, _new(kept, axis, more, part, in_embedding(layer, adapter))], dim=axis)
        if isinstance(tensor, nn.Parameter):
            if rank:  # a state that is not cut by direction goes with its parameter
                _resize_state(optimizer, tensor, axis, index, more)
            set_values(tensor, values)
        else:
            tensor.data = values
    note_rank(layer, adapter, rank)


def _new(kept: Tensor, axis: int, more: int, part: str, embedding: bool) -> Tensor:
    """New directions of A, B or the gate, in the shape of what is kept."""
    new = kept.new_zeros([more if at == axis else size for at, size in enumerate(kept.shape)])
    if part == "gate":
        return new.fill_(1)
    if embedding:
        return new.normal_() if part == "B" else new
    return new.uniform_(-1, 1).mul_(math.prod(kept.shape[1:]) ** -0.5) if part == "A" else new


def _resize_state(optimizer: Optimizer | None, parameter: nn.Parameter, axis: int, index: Tensor, more: int) -> None:
    """Cut what the optimizer keeps for a parameter, and add zeros for new directions."""
    state: dict[str, Any] = optimizer.state.get(parameter, {}) if optimizer is not None else {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.ndim and value.shape[axis] == parameter.shape[axis]:
            cut = value.index_select(axis, index.to(value.device))
            shape = [more if at == axis else size for at, size in enumerate(cut.shape)]
            state[key] = torch.cat([cut, cut.new_zeros(shape)], dim=axis)


def forget_empty(optimizer: Optimizer | None) -> None:
    """Take parameters without a number, those of removed adapters, out of an optimizer's groups and state."""
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not parameter.numel():
                optimizer.state.pop(parameter, None)
        group["params"] = [parameter for parameter in group["params"] if parameter.numel()]


def remove_from_layer(model: nn.Module, name: str, adapter: str) -> None:
    """Delete the adapter from its layer; a layer without any adapter becomes its base layer again."""
    assert isinstance(model, PeftModel)
    parent_name, _, child = name.rpartition(".")
    parent = model.get_base_model().get_submodule(parent_name)
    layer = getattr(parent, child)
    if len(layer.r) > 1:
        # Where the active adapter is deleted PEFT activates another one, which would change the function.
        active = list(layer.active_adapters)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer.delete_adapter(adapter)
        layer.set_adapter(active)
    else:
        setattr(parent, child, layer.get_base_layer())


def update_config(model: nn.Module, adapter: str) -> None:
    """State each layer's rank in the config, and the alpha that gives its scaling at that rank."""
    config: LoraConfig = model.peft_config[adapter]  # type: ignore[index]
    root = math.sqrt if config.use_rslora else float
    layers = dict(adapted_layers(model, adapter))
    for layer in layers.values():
        layer.lora_alpha[adapter] = layer.scaling[adapter] * root(layer.r[adapter])
    keys = pattern_keys(model, layers)
    config.target_modules = target_modules(model, layers)
    config.rank_pattern = {keys[name]: layer.r[adapter] for name, layer in layers.items()}
    config.alpha_pattern = {keys[name]: layer.lora_alpha[adapter] for name, layer in layers.items()}


def kept_parameters(layers: Iterable[LoraLayer], adapter: str) -> int:
    """Trained numbers of an adapter in these layers: A, B and the gates."""
    return sum(
        held.tensor.numel()
        for layer in layers
        for held in directions(layer, adapter)
        if isinstance(held.tensor, nn.Parameter)
    )


def check_one_process(what: str) -> None:
    """Raise a ``UserError`` for ``what`` in a training of several processes, whose wrappers hold the first shapes."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise UserError(
            f"{what} in a training of {distributed.get_world_size()} processes is not possible, since their wrappers "
            "hold the shapes they began with: leave it out, or train in one process"
        )
