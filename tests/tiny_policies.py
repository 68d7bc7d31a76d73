"""Small policies of each kind, a few steps of their training, and all of their state that can be compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import rankwise as rw
import tiny
from rankwise.preferences.reference import Reference


def tied_gpt2() -> nn.Module:
    """All weights trained; the output head is the embedding."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=48, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.2)
    )


POLICIES: dict[str, Callable[[], nn.Module]] = {
    "all weights": lambda: tiny.make("llama"),
    "all weights, tied": tied_gpt2,
    "lora": lambda: tiny.adapted("llama", lora_dropout=0.4),
    "lora with biases": lambda: tiny.adapted("gpt2", bias="all"),
    "lora with a saved head": lambda: tiny.adapted("llama", modules_to_save=["lm_head"]),
    "lora with trained tokens": lambda: tiny.adapted("llama", trainable_token_indices=[5, 9]),
    "dora": lambda: tiny.adapted("llama", use_dora=True),
    "milora": lambda: tiny.adapted("llama", rw.MiloraConfig),
    "sora": lambda: tiny.adapted("llama", rw.SoraConfig, lora_alpha=8),
    "sora of a spectrum": lambda: tiny.adapted("llama", rw.SoraConfig, lora_alpha=8, part="minor"),
}
ADAPTED = [name for name in POLICIES if name not in ("all weights", "all weights, tied", "lora with biases")]


def two_adapters(second: str = "sft") -> PeftModel:
    """A policy whose ``default`` is trained and whose ``second`` is another adapter, trained before."""
    model = tiny.adapted("llama", lora_dropout=0.4, modules_to_save=["lm_head"])
    model.add_adapter(second, LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "o_proj"]))
    model.set_adapter(second)
    tiny.train(model)
    model.set_adapter("default")
    return model


def move(model: nn.Module, steps: int = 2, rate: float = 0.05, seed: int = 7) -> torch.optim.Optimizer:
    """A few steps of training with dropout; the model is left in training mode."""
    model.train()
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=rate)
    torch.manual_seed(seed)
    for _ in range(steps):
        step(model, optimizer)
    return optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(input_ids=tiny.IDS, labels=tiny.IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that using a reference could disturb: values, their storage, gradients, modes, adapters and hooks."""
    found: dict[str, Any] = {"modes": {name: module.training for name, module in model.named_modules()}}
    found["modules"] = {name: id(module) for name, module in model.named_modules()}
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        gradient = None if value.grad is None else value.grad.tolist()
        found[name] = (id(value), value.data_ptr(), value.tolist(), value.requires_grad, gradient)
    for name, module in model.named_modules():
        if hasattr(module, "active_adapters") and not callable(module.active_adapters):
            found[f"{name} adapters"] = [*module.active_adapters], getattr(module, "disable_adapters", None)
        if hasattr(module, "gradient_checkpointing"):
            found[f"{name} checkpointing"] = module.gradient_checkpointing
    return found


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == []


def scores(reference: Reference) -> Tensor:
    with reference.active() as model:
        return model(input_ids=tiny.IDS).logits
