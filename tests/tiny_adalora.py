"""AdaLoRA adapters on the small models, a loop over PEFT's own allocator, and rows for trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import tiny
from rankwise.ranks import AdaloraAllocation

STEPS = 14
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS"}


def config(family: str = "llama", **settings: Any) -> peft.AdaLoraConfig:
    """Rank 4 falls to a mean of 2 between step 3 and step 10 of 14."""
    chosen: dict[str, Any] = {
        "init_r": 4,
        "target_r": 2,
        "tinit": 3,
        "tfinal": 4,
        "total_step": STEPS,
        "lora_alpha": 6,
        "target_modules": tiny.TARGETS[family],
        "fan_in_fan_out": family == "gpt2",
        "task_type": TASKS[family],
    }
    return peft.AdaLoraConfig(**chosen | settings)


def adapt(family: str = "llama", base: nn.Module | None = None, **settings: Any) -> peft.PeftModel:
    """A new adapter; the same numbers at every call."""
    made = tiny.make(family) if base is None else base
    torch.manual_seed(1)
    return peft.get_peft_model(made, config(family, **settings))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2, weight_decay=0.0)


def peft_loop(model: peft.PeftModel, steps: int = STEPS) -> peft.PeftModel:
    """Training as PEFT's documentation has it, which is the reference for ours."""
    optimizer = adamw(model)
    for number in range(1, steps + 1):
        tiny.loss(model).backward()
        optimizer.step()
        model.base_model.update_and_allocate(number)
        optimizer.zero_grad()
    return model


def allocate(model: peft.PeftModel, steps: int = STEPS, total: int = STEPS) -> AdaloraAllocation:
    """Train by our own loop."""
    allocation, optimizer = AdaloraAllocation(model, total), adamw(model)
    for number in range(1, steps + 1):
        tiny.loss(model).backward()
        optimizer.step()
        allocation.step(number)
        optimizer.zero_grad()
    allocation.finish()
    return allocation


def factors(model: nn.Module) -> dict[str, Tensor]:
    """All of A, E and B by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" in name}


def live(model: nn.Module) -> dict[str, int]:
    """Directions of each layer whose value is not zero."""
    return {name: int((layer.lora_E["default"] != 0).sum()) for name, layer in tiny.layers(model).items()}


def rows(count: int = 16) -> list[dict[str, list[int]]]:
    """Sentences of eight tokens, as many as are wanted."""
    drawn = torch.randint(1, 48, (count, 8), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": ids, "labels": ids, "attention_mask": [1] * 8} for ids in drawn.tolist()]


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    """Fourteen optimizer steps, each of two batches of two rows, clipped."""
    chosen: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "max_steps": STEPS,
        "learning_rate": 3e-2,
        "lr_scheduler_type": "linear",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "seed": 5,
    }
    return TrainingArguments(**chosen | settings)


def trainer(model: nn.Module, folder: Path, *callbacks: Any, **settings: Any) -> Trainer:
    """The Trainer of transformers, whose loss is the model's own."""
    return Trainer(
        model=model,
        args=arguments(folder, **settings),
        train_dataset=rows(),
        eval_dataset=rows(4),
        callbacks=list(callbacks),
    )
