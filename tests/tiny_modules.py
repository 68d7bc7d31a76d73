"""Models of a single module of each kind that an adapter fits on, and their weight as a matrix."""

from __future__ import annotations

import numpy as np
import peft
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import rankwise as rw

KINDS = ["linear", "conv1d_of_gpt2", "embedding", "conv1d", "conv2d", "conv3d"]


class One(nn.Module):
    """A model of a single module, named ``only``, and a second one that is not adapted."""

    def __init__(self, only: nn.Module) -> None:
        super().__init__()
        self.only = only
        self.other = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.only(x)


def make(kind: str) -> tuple[One, torch.Tensor]:
    """A model of one module and an input of two rows."""
    torch.manual_seed(0)
    numbers = torch.tensor([[0, 3, 8, 3], [1, 1, 2, 7]])
    modules = {
        "linear": (nn.Linear(7, 6), torch.randn(2, 3, 7)),
        "conv1d_of_gpt2": (Conv1D(6, 7), torch.randn(2, 3, 7)),
        "embedding": (nn.Embedding(9, 6, padding_idx=1), numbers),
        "conv1d": (nn.Conv1d(3, 6, 3, stride=2, padding=1), torch.randn(2, 3, 9)),
        "conv2d": (nn.Conv2d(3, 6, (2, 3), stride=(2, 1), padding="valid", bias=False), torch.randn(2, 3, 6, 5)),
        "conv3d": (nn.Conv3d(2, 6, 2), torch.randn(2, 2, 3, 4, 3)),
    }
    only, x = modules[kind]
    if isinstance(only, Conv1D):
        nn.init.normal_(only.weight)
    return One(only).eval(), x


def matrix(weight: torch.Tensor, kind: str) -> np.ndarray:
    """The stated view of a weight as (out, in)."""
    flat = weight.detach().double().flatten(1).numpy()
    return flat.T if kind in ("embedding", "conv1d_of_gpt2") else flat


def adapt(
    kind: str, config: type[peft.LoraConfig] = rw.MiloraConfig, **settings
) -> tuple[peft.PeftModel, torch.Tensor]:
    base, x = make(kind)
    return peft.get_peft_model(base, config(**{"r": 3, "target_modules": ["only"]} | settings)).eval(), x


def train(model: peft.PeftModel, x: torch.Tensor, steps: int = 4) -> peft.PeftModel:
    """A few steps towards outputs that are all one."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    for _ in range(steps):
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def with_weight(kind: str, update: np.ndarray, x: torch.Tensor) -> torch.Tensor:
    """The base's output with its weight changed by a matrix, in float64."""
    base, _ = make(kind)
    base = base.double()
    change = torch.tensor(update)
    change = change.T if kind in ("embedding", "conv1d_of_gpt2") else change.reshape(base.only.weight.shape)
    base.only.weight.data += change
    return base(x if kind == "embedding" else x.double())
