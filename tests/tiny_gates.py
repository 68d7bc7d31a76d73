"""A small Llama with gates, and a step of its training."""

from __future__ import annotations

import peft
import torch
from torch import nn

import rankwise as rw
import tiny
from rankwise.ranks import gates


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
