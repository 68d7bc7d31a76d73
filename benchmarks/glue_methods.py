"""What each method of `glue_ranks.py` trains, with which optimizer, and what is left of it at the end."""

from __future__ import annotations

from typing import Any, NamedTuple

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

import rankwise as rw
from rankwise.ranks import AdaloraCallback, adalora_ranks, attach_proximal_step

RANK, ALPHA, RATIO = 8, 16, 0.7
WEIGHT_DECAY = 0.1
# Every linear layer of attention and feed-forward. The pooler counts as head: it is trained in full by every method.
TARGETS = ["query", "key", "value", "intermediate.dense", "output.dense"]
HEAD = ("pooler", "classifier")
COMMON: dict[str, Any] = {
    "lora_alpha": ALPHA,
    "task_type": "SEQ_CLS",
    "target_modules": TARGETS,
    "modules_to_save": list(HEAD),
}
# 6 directions in attention and 5 in feed-forward are 204 of LoRA's 288 and 68% of its parameters: the nearest to 70%
# with one rank for each kind of module.
SMALL = {"r": 6, "rank_pattern": {"intermediate.dense": 5, r"layer\.\d+\.output.dense": 5}}


class Tools(NamedTuple):
    """A model to train, what trains it, and the inputs and outputs of each layer that has an adapter."""

    model: peft.PeftModel | PreTrainedModel
    optimizer: torch.optim.Optimizer
    callbacks: list[TrainerCallback]
    sizes: dict[str, int]


def prepared(base: PreTrainedModel, method: str, rate: float, steps: int) -> Tools:
    """The model with what the method trains in it, and the head trained in any case."""
    if method in ("full", "bitfit"):
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(method == "full" or name.endswith(".bias") or is_head(name))
        return Tools(base, adamw(base, rate), [], {})
    model = peft.get_peft_model(base, config_of(method, steps))
    sizes = {name: layer.in_features + layer.out_features for name, layer in layers(model).items()}
    optimizer, callbacks = adamw(model, rate), list[TrainerCallback]()
    if method == "adalora":
        # A whole target_r for each layer would be 75%.
        model.base_model.rankallocator.target_bgt = round(RATIO * RANK * len(sizes))
        callbacks = [AdaloraCallback()]
    if method == "sora":
        attach_proximal_step(optimizer, model, steps)
    return Tools(model, optimizer, callbacks, sizes)


def config_of(method: str, steps: int) -> peft.PeftConfig:
    """The adapter of a method, for a training of so many steps."""
    if method == "lora":
        return peft.LoraConfig(r=RANK, **COMMON)
    if method in ("alora", "lora-small"):
        return peft.LoraConfig(**SMALL, **COMMON)
    if method == "sora":
        return rw.SoraConfig(r=RANK, target_ratio=RATIO, budget_by=0.5, shrink_after=50, **COMMON)
    # Shares of the training, interval and penalty are about those of the authors' scripts for RTE and STS-B.
    return peft.AdaLoraConfig(
        init_r=RANK,
        target_r=6,
        tinit=round(0.15 * steps),
        tfinal=round(0.45 * steps),
        deltaT=10,
        orth_reg_weight=0.3,
        total_step=steps,
        **COMMON,
    )


def adamw(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """AdamW over what is trained, with weight decay on matrices only: not on biases, norms and gates."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate)


def layers(model: peft.PeftModel) -> dict[str, LoraLayer]:
    """The layers that have an adapter, by their names in the base model."""
    return {name: one for name, one in model.get_base_model().named_modules() if isinstance(one, LoraLayer)}


def is_head(name: str) -> bool:
    return any(f"{part}." in name for part in HEAD)


def trained_parameters(model: nn.Module) -> int:
    """Numbers that are trained, without the head's."""
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and not is_head(name))


def finish(tools: Tools, method: str) -> dict[str, Any]:
    """Drop what is not used any more, and count: the rank of each layer, and parameters as plain LoRA has them."""
    if not tools.sizes:
        return {"parameters_end": trained_parameters(tools.model), "ranks": {}}
    if method == "sora":
        rw.prune(tools.model)
    ranks = dict.fromkeys(tools.sizes, 0)
    if method == "adalora":
        ranks |= adalora_ranks(tools.model)
    else:
        ranks |= {name: layer.r["default"] for name, layer in layers(tools.model).items()}
    short = {name.partition("encoder.")[2]: rank for name, rank in ranks.items()}
    return {"parameters_end": sum(ranks[name] * size for name, size in tools.sizes.items()), "ranks": short}
