"""A small Llama with gates, a step of its training, and a trainer of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import rankwise as rw
import tiny
from rankwise.ranks import SoraCallback, gates, optimizer_factory


def adapt(small: float = 1.0, dtype: torch.dtype = torch.float32, **settings) -> peft.PeftModel:
    """Gates of the given size; at 0.03 and a threshold of 0.005 some die in each of the first steps."""
    config = {"r": 4, "target_modules": tiny.TARGETS["llama"], "l1": 0.0, "threshold": 5e-3} | settings
    torch.manual_seed(1)
    model = peft.get_peft_model(tiny.make("llama", dtype), rw.SoraConfig(**config))
    for gate in gates(model).values():
        gate.data.mul_(small)
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    loss = tiny.loss(model)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


class Data(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 48, (6,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def arguments(folder: Path, **settings) -> TrainingArguments:
    common = {"per_device_train_batch_size": 4, "max_steps": 12, "learning_rate": 5e-3, "logging_steps": 1}
    common |= {"save_steps": 6, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "max_grad_norm": 1e9}
    return TrainingArguments(output_dir=str(folder), **common | settings)


def trainer(folder: Path, model: peft.PeftModel, made_before: bool = False, **settings) -> Trainer:
    """With an optimizer that the trainer makes, or one that was made before."""
    rates = {"lr": 5e-3, "gate_lr": 1e-2, "weight_decay": 0.1}
    if made_before:
        optimizer: dict[str, Any] = {"optimizers": (rw.sora_optimizer(model, **rates), None)}
    else:
        optimizer = {"optimizer_cls_and_kwargs": (optimizer_factory, rates)}
    return Trainer(
        model,
        arguments(folder, **settings),
        train_dataset=Data(),
        eval_dataset=Data(),
        callbacks=[SoraCallback()],
        **optimizer,
    )
