"""Small models of each kind, and any method trained on them."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
)

import tiny
from rankwise.optimisation import training_tools
from rankwise.recipes import make_recipe
from rankwise.schema import METHODS, Recipe

KINDS = {"decoder": "CAUSAL_LM", "encoder": "SEQ_CLS", "encoder-decoder": "SEQ_2_SEQ_LM"}
AUTO = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
}
SMALL: dict[str, dict[str, Any]] = {"vera": {"r": 8}, "bottleneck": {"size": 4}, "prompt": {"tokens": 4}}
SMALL |= {"prefix": {"tokens": 4}, "full": {}, "bitfit": {}}


def recipe(method: str, **changed: Any) -> Recipe:
    """A recipe with a small adapter of a method."""
    small = SMALL.get(METHODS[method].settings["kind"], {"r": 4})
    return make_recipe(
        {
            "adapter": {"kind": method, **small, **changed},
            "data": {"kind": "text", "train": "-"},
            "stages": [{"kind": "sft", "learning_rate": 3e-2}],
            "output": "-",
        }
    )


def base(kind: str) -> PreTrainedModel:
    """A model of two layers, all of which have biases; the same weights at every call."""
    if kind != "encoder-decoder":
        return tiny.make({"decoder": "gpt2", "encoder": "bert"}[kind])
    torch.manual_seed(0)
    sizes = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    widths = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32}
    return BartForConditionalGeneration(BartConfig(vocab_size=48, init_std=0.2, **sizes, **widths)).eval()


def inputs(kind: str) -> dict[str, Tensor]:
    found = {"input_ids": tiny.IDS, "attention_mask": torch.ones_like(tiny.IDS)}
    return found | ({"labels": tiny.LABELS} if kind == "encoder" else {"labels": tiny.IDS})


@torch.no_grad()
def logits(model: torch.nn.Module, kind: str) -> Tensor:
    given = {name: value for name, value in inputs(kind).items() if name != "labels"}
    if kind == "encoder-decoder":
        given["decoder_input_ids"] = tiny.IDS
    found: Tensor = model.eval()(**given).logits
    return found


def train(model: PeftModel, kind: str, wanted: Recipe, steps: int = 12) -> list[float]:
    """Losses while a batch is learnt by heart."""
    [stage] = wanted.stages
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    made = training_tools(model, stage, wanted.adapter, 100).optimizer
    optimizer = made or torch.optim.AdamW(trained, lr=stage.learning_rate)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(**inputs(kind)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    model.eval()
    return losses
