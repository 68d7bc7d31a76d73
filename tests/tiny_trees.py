"""Prompts with answers that share beginnings, small models of several families, and separate sequences as reference."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import transformers
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

Row = tuple[list[int], list[list[int]]]

# Equal answers, answers that are beginnings of others, one-token answers, and a prompt that repeats itself.
ROWS: list[Row] = [
    ([5, 9, 2, 9, 2], [[7, 8, 3], [7, 8, 4, 4], [7, 8], [11], [7, 8, 3], [12, 7, 8]]),
    ([1], [[4], [4, 1], [4, 1, 1]]),
    ([6, 6, 6], [[6, 6], [30, 31, 32, 33]]),
]

SMALL = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDE = SMALL | {"head_dim": 8}
FEW_LAYER_TYPES = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
GPT2 = {"vocab_size": 48, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}

# Class without its ending, and settings; windows are just long enough for the rows above.
FAMILIES = {
    "llama": ("Llama", SMALL),
    "mistral": ("Mistral", SMALL | {"sliding_window": 16}),
    "qwen2": ("Qwen2", SMALL | {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 16}),
    "qwen3": ("Qwen3", WIDE),
    "gemma": ("Gemma", WIDE),
    "gemma2": ("Gemma2", WIDE | FEW_LAYER_TYPES | {"query_pre_attn_scalar": 8}),
    "gemma3_text": ("Gemma3", WIDE | FEW_LAYER_TYPES | {"query_pre_attn_scalar": 8}),
    "gpt2": ("GPT2", GPT2 | {"bos_token_id": 1, "eos_token_id": 2}),
    "gpt_neox": ("GPTNeoX", SMALL),
    "opt": ("OPT", SMALL | {"ffn_dim": 24, "word_embed_proj_dim": 12, "init_std": 0.3}),
    "phi": ("Phi", SMALL),
    "phi3": ("Phi3", SMALL),
}
HEADS = {"gpt2": "LMHeadModel"}
CONFIGS = {"gemma3_text": "Gemma3TextConfig"}


def make(
    family: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa", **settings: object
) -> PreTrainedModel:
    """A model of two layers in evaluation mode; the same weights at every call."""
    name, usual = FAMILIES[family]
    config = getattr(transformers, CONFIGS.get(family, f"{name}Config"))(**usual | settings)
    kind = getattr(transformers, name + HEADS.get(family, "ForCausalLM"))
    torch.manual_seed(0)
    model = kind._from_config(config, attn_implementation=attention).eval().to(dtype)
    return all_in_float64(model) if dtype == torch.float64 else model


def all_in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """Norms of transformers' models round to float32, whatever the model's dtype: here they do not."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(_scaled, module)
    return model


def _scaled(norm: nn.Module, hidden: Tensor) -> Tensor:
    return (1 + norm.weight) * hidden * (hidden.pow(2).mean(dim=-1, keepdim=True) + 1e-6).rsqrt()


def separate(model: nn.Module, rows: Sequence[Row]) -> list[Tensor]:
    """Log-probabilities of each row's answers: every sequence by itself, whole and without padding."""
    found = []
    for prompt, answers in rows:
        totals = []
        for answer in answers:
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            totals.append(-nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
        found.append(torch.stack(totals))
    return found


def gradients(model: nn.Module, totals: Sequence[Tensor]) -> dict[str, Tensor]:
    """Of a weighted sum of the log-probabilities, for each trained parameter; the same weights at every call."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(len(values), generator=generator, dtype=torch.float64).to(values) for values in totals]
    sum((weight * values).sum() for weight, values in zip(weights, totals, strict=True)).backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def assert_same(found: Tensor, expected: Tensor, tolerance: float, largest: float) -> None:
    """Relative to themselves, or to the largest number of their kind: some gradients are zero but for rounding."""
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * largest)


def rows_of(tokens: int, longest: int = 5, answers: int = 6) -> st.SearchStrategy[Row]:
    """A few tokens only, so that equal beginnings, equal answers and beginnings of others are common."""
    token = st.integers(1, tokens)
    texts = st.lists(token, min_size=1, max_size=longest)
    return st.tuples(texts, st.lists(texts, min_size=1, max_size=answers))
