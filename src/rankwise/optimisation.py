"""What trains a kind of adapter beside the trainer's own loop: its optimizer and its callbacks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback

from rankwise.errors import UserError
from rankwise.files import to_json
from rankwise.ranks import AdaloraCallback, AllocationCallback, SoraCallback, sora_optimizer
from rankwise.ranks.adalora.allocation import set_schedule
from rankwise.ranks.allocating.allocation import allocation_steps
from rankwise.schema import (
    AdaloraSettings,
    AdapterSettings,
    AllocatingLoraSettings,
    LoraSettings,
    SftStage,
    SoftmaxDpoStage,
    SoraSettings,
)

ALLOCATIONS = "allocations.jsonl"
Row = TypeVar("Row")


class Tools(NamedTuple):
    """An optimizer, or None where the trainer makes its own, and callbacks for the trainer."""

    optimizer: Optimizer | None
    callbacks: list[TrainerCallback]


def training_tools(model: PeftModel, stage: SftStage | SoftmaxDpoStage, adapter: AdapterSettings, steps: int) -> Tools:
    """AdamW with what the adapter needs beside it.

    Args:
        model: the base with its adapter.
        stage: the stage's settings.
        adapter: the recipe's adapter settings.
        steps: optimizer steps of the stage.

    Raises:
        UserError: the stage is too short for the schedule of AdaLoRA or of allocating LoRA.
    """
    if isinstance(adapter, SoraSettings):
        made = sora_optimizer(model, lr=stage.learning_rate, gate_lr=adapter.gate_lr, weight_decay=stage.weight_decay)
        return Tools(made, [SoraCallback()])
    if isinstance(adapter, AllocatingLoraSettings):
        allocation_steps(steps, adapter.events, adapter.first, adapter.last)  # refuses a stage that is too short
    if isinstance(adapter, AdaloraSettings):
        set_schedule(model, steps, adapter.warmup_share, adapter.final_share)
        return Tools(None, [AdaloraCallback()])
    if isinstance(adapter, LoraSettings) and adapter.lora_plus_ratio is not None:
        return Tools(_lora_plus(model, stage, adapter.lora_plus_ratio), [])
    return Tools(None, [])


def hold_out(rows: Sequence[Row], adapter: AdapterSettings, batch: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and rows that allocating LoRA scores directions on, in random order; none for other adapters.

    Args:
        rows: all.
        adapter: says how many at most; no more than the batches of all events are held out.
        batch: rows of a batch of evaluation.
        seed: of the draw.

    Raises:
        UserError: no row would be left to train on.
    """
    if not isinstance(adapter, AllocatingLoraSettings):
        return list(rows), []
    count = min(adapter.validation_rows, adapter.events * batch)
    if count >= len(rows):
        wanted = f"adapter.validation_rows {adapter.validation_rows}"
        raise UserError(f"{wanted} leaves nothing to train on, of {len(rows)} training rows: lower it")
    drawn = random.Random(seed).sample(range(len(rows)), count)
    held = set(drawn)
    return [row for number, row in enumerate(rows) if number not in held], [rows[number] for number in drawn]


def add_allocation(trainer: Trainer, adapter: AdapterSettings) -> AllocationCallback | None:
    """Give the trainer of allocating LoRA, whose ``eval_dataset`` are the rows held out, what moves directions."""
    if not isinstance(adapter, AllocatingLoraSettings):
        return None
    settings = adapter.model_dump(include={"events", "share", "first", "last"})
    made = AllocationCallback(trainer, **settings)
    trainer.add_callback(made)
    return made


def record_allocation(callback: AllocationCallback, folder: Path, stage: str, held: int) -> dict[str, int]:
    """Append what was moved in a stage to a run's ``allocations.jsonl``; returns counts of it."""
    with (folder / ALLOCATIONS).open("a", encoding="utf-8") as file:
        for event in callback.history:
            file.write(to_json({"stage": stage, **asdict(event)}) + "\n")
    return {
        "rows held out to score directions": held,
        "directions moved": sum(event.moved for event in callback.history),
        "layers whose adapter was removed": sum(len(event.removed) for event in callback.history),
    }


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
