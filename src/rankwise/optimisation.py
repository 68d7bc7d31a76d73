"""What trains a kind of adapter beside the trainer's own loop: its optimizer and its callbacks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch.optim import Optimizer
from transformers import TrainerCallback

from rankwise.ranks import sora_optimizer
from rankwise.schema import LoraSettings, SftStage, SoftmaxDpoStage, SoraSettings


class Tools(NamedTuple):
    """An optimizer, or None where the trainer makes its own, and callbacks for the trainer."""

    optimizer: Optimizer | None
    callbacks: list[TrainerCallback]


def training_tools(model: PeftModel, stage: SftStage | SoftmaxDpoStage, adapter: LoraSettings, steps: int) -> Tools:
    """AdamW with what the adapter needs beside it.

    Args:
        model: the base with its adapter.
        stage: the stage's settings.
        adapter: the recipe's adapter settings.
        steps: optimizer steps of the stage.
    """
    if isinstance(adapter, SoraSettings):
        made = sora_optimizer(model, lr=stage.learning_rate, gate_lr=adapter.gate_lr, weight_decay=stage.weight_decay)
        return Tools(made, [])
    if adapter.lora_plus_ratio is not None:
        return Tools(_lora_plus(model, stage, adapter.lora_plus_ratio), [])
    return Tools(None, [])


def _lora_plus(model: PeftModel, stage: SftStage | SoftmaxDpoStage, ratio: float) -> Optimizer:
    made: Optimizer = create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=stage.learning_rate,
        loraplus_lr_ratio=ratio,
        loraplus_lr_embedding=stage.learning_rate,
        loraplus_weight_decay=stage.weight_decay,
        weight_decay=stage.weight_decay,
    )
    return made
