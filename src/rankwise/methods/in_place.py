"""Methods that train the base's own weights, all of them or its biases, and the base as it was before.

PEFT needs an adapter to hold: theirs is a LoRA that adapts no module. The weights that are trained are also kept as
they were, on the CPU, so that the base is still to be had.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.errors import UserError
from rankwise.models import loading
from rankwise.models.base import load_base

KEPT = "_weights_before_training"


def train_all(base: PreTrainedModel) -> PeftModel:
    """The model with all its weights trained."""
    model = PeftModel(base, LoraConfig(target_modules=DUMMY_TARGET_MODULES))
    base.requires_grad_(True)
    return _keep(model, dict(base.named_parameters()))


def train_biases(base: PreTrainedModel, task_type: str) -> PeftModel:
    """The model with its biases trained, and a classifier's head.

    Raises:
        UserError: it has no bias.
    """
    biases = {name: weight for name, weight in base.named_parameters() if name.endswith(".bias")}
    if not biases:
        raise UserError(f"adapter.kind bitfit trains biases, and {type(base).__name__} has none: take another method")
    config = LoraConfig(target_modules=DUMMY_TARGET_MODULES, bias="all", task_type=task_type)
    return _keep(get_peft_model(base, config), biases)


def _keep(model: PeftModel, weights: dict[str, nn.Parameter]) -> PeftModel:
    """Note what the weights are before they are trained; a head that PEFT keeps apart is no part of the base."""
    held = [weight for weight in weights.values() if not weight.is_meta]
    setattr(model, KEPT, [(weight, weight.detach().to("cpu", copy=True)) for weight in held])
    return model


def is_in_place(model: nn.Module) -> bool:
    """Whether the base's own weights are trained."""
    return hasattr(model, KEPT)


def trains_all(model: PeftModel) -> bool:
    """Whether all of the base's weights are trained, not its biases alone."""
    return is_in_place(model) and model.active_peft_config.bias == "none"


def weights_before(model: PeftModel) -> dict[Tensor, Tensor]:
    """The weights that are trained in place, and what they were before, on the CPU."""
    kept: list[tuple[nn.Parameter, Tensor]] = getattr(model, KEPT, [])
    return dict(kept)


@contextlib.contextmanager
def base_of(model: PeftModel) -> Iterator[None]:
    """The model is its base meanwhile: without its adapter, and with the weights that it had before training."""
    kept: list[tuple[nn.Parameter, Tensor]] = getattr(model, KEPT, [])
    trained = [weight.detach().clone() for weight, _ in kept]
    with _without_adapter(model):
        try:
            _put(kept)
            yield
        finally:
            _put([(weight, now) for (weight, _), now in zip(kept, trained, strict=True)])


@contextlib.contextmanager
def _without_adapter(model: PeftModel) -> Iterator[None]:
    """As PEFT's ``disable_adapter``, which fails without an adapted layer, and on classifiers with virtual tokens."""
    virtual = model.active_peft_config.is_prompt_learning
    base = model.get_base_model()
    if not is_in_place(model) and not (virtual and not hasattr(base, "prepare_inputs_for_generation")):
        with model.disable_adapter():
            if virtual:  # by the base's hooks, one of which counts positions
                model.forward = base.__call__
            yield
        return
    heads = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    own = model.forward
    try:
        for head in heads:
            head.enable_adapters(False)
        if virtual:
            model.forward = base.forward
        yield
    finally:
        for head in heads:
            head.enable_adapters(True)
        if virtual:
            model.forward = own


@torch.no_grad()
def _put(weights: list[tuple[nn.Parameter, Tensor]]) -> None:
    for weight, values in weights:
        weight.copy_(values)


def save_whole(model: PeftModel, folder: Path) -> None:
    """Write the model with all its weights, as transformers does."""
    model.get_base_model().save_pretrained(folder)


def load_whole(model: PeftModel, folder: Path) -> None:
    """Put the weights of a written model into this one.

    Raises:
        UserError: the folder holds none, or one that does not fit.
    """
    base = model.get_base_model()
    with loading(f"the whole model in {folder}"):
        base.load_state_dict(load_base(type(base), str(folder), dtype=base.dtype).state_dict())
