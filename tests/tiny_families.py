"""A model of two layers for each family that MiLoRA is tested on, its input, and what is adapted beside Linear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

import tiny

SIZES = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
}
DECODER = SIZES | {"num_key_value_heads": 2, "tie_word_embeddings": False}
DEBERTA = SIZES | {"num_labels": 3, "relative_attention": True, "max_relative_positions": 8, "type_vocab_size": 0}


@dataclass(frozen=True)
class Family:
    """How a family is made.

    Attributes:
        model: class in transformers; its config is found by the name.
        config: class of the config in transformers.
        settings: of the config.
        beside: ends of names of modules that ``all-linear`` leaves out: an embedding or a convolution.
        labels: of the two rows: of their tokens, of each row, or none but the rows themselves.
        pictures: whether it sees pictures.
    """

    model: str
    config: str
    settings: dict[str, Any] = field(default_factory=lambda: DECODER)
    beside: tuple[str, ...] = ("embed_tokens",)
    labels: str = "tokens"
    pictures: bool = False


FAMILIES = {
    "llama": Family("LlamaForCausalLM", "LlamaConfig"),
    "mistral": Family("MistralForCausalLM", "MistralConfig"),
    "qwen2": Family("Qwen2ForCausalLM", "Qwen2Config"),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", DECODER | {"head_dim": 4}),
    "gemma": Family("GemmaForCausalLM", "GemmaConfig", DECODER | {"head_dim": 4}),
    "gemma3": Family("Gemma3ForCausalLM", "Gemma3TextConfig", DECODER | {"head_dim": 4}),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": 48,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 32,
            "initializer_range": 0.2,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        ("wte",),
    ),
    "opt": Family(
        "OPTForCausalLM",
        "OPTConfig",
        SIZES | {"ffn_dim": 24, "word_embed_proj_dim": 12, "init_std": 0.2, "tie_word_embeddings": False},
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 48, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
        | {"decoder_start_token_id": 0, "initializer_factor": 1.0, "tie_word_embeddings": False},
        ("relative_attention_bias",),
    ),
    "bert": Family(
        "BertForSequenceClassification", "BertConfig", SIZES | {"num_labels": 3}, ("word_embeddings",), "rows"
    ),
    "deberta-v2": Family(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        DEBERTA | {"pos_att_type": ["c2p", "p2c"], "conv_kernel_size": 3, "conv_act": "gelu"},
        ("word_embeddings", "conv.conv"),
        "rows",
    ),
    "deberta-v3": Family(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        DEBERTA
        | {"pos_att_type": ["p2c", "c2p"], "share_att_key": True, "position_buckets": 4, "norm_rel_ebd": "layer_norm"},
        ("word_embeddings",),
        "rows",
    ),
    "vit": Family(
        "ViTForImageClassification",
        "ViTConfig",
        SIZES | {"image_size": 8, "patch_size": 4, "num_labels": 3},
        ("projection",),
        "rows",
        pictures=True,
    ),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of the family; the same weights at every call."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, family.config)(**family.settings)
    kind: Callable[..., PreTrainedModel] = getattr(transformers, family.model)
    return kind(config).eval().to(dtype)


def inputs(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What the model is called with, labels included."""
    family = FAMILIES[name]
    labels = tiny.LABELS if family.labels == "rows" else tiny.IDS
    if not family.pictures:
        return {"input_ids": tiny.IDS, "labels": labels}
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return {"pixel_values": pixels.to(dtype), "labels": labels}


def targets(name: str, model: nn.Module) -> list[str]:
    """All Linear modules but a language model's output layer, as ``all-linear`` means them, and those beside."""
    head = model.get_output_embeddings()
    linear = (nn.Linear, transformers.pytorch_utils.Conv1D)
    return [
        full
        for full, module in model.named_modules()
        if (isinstance(module, linear) and module is not head) or full.endswith(FAMILIES[name].beside)
    ]


@torch.no_grad()
def logits(model: nn.Module, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return model(**inputs(name, dtype)).logits


def train(model: nn.Module, name: str, steps: int = 3, rate: float = 1e-2) -> nn.Module:
    """A few steps of Adam in evaluation mode, so that nothing is random."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        model(**inputs(name)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model
