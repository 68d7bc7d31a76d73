"""Which models take trees, what is said of the others, and how a model that nobody tested is tried out."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers import LlamaForCausalLM, LlamaModel, PreTrainedModel

from rankwise.trees import why_no_trees
from rankwise.trees.probing import trees_are_exact
from rankwise.trees.support import TESTED
from tiny_trees import FAMILIES, GPT2, SMALL, WIDE, make

LAYERS = "its layers of type '{}' are not attention under a mask alone"
STATE = "it carries a state from token to token"
PLACES = "its positions are places in the row, whatever position_ids say"
EXPERTS = SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


def built(name: str, settings: dict[str, Any], config: str = "", ending: str = "ForCausalLM") -> PreTrainedModel:
    """A small model of any class, and its head's weights such that the context matters."""
    torch.manual_seed(0)
    made = getattr(transformers, config or f"{name}Config")(**settings)
    return getattr(transformers, name + ending)(made).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_tested_families_take_trees(family: str) -> None:
    model = make(family, attention="eager")
    assert model.config.model_type == family
    assert why_no_trees(model, 16) is None


def test_every_family_that_is_called_tested_is() -> None:
    assert FAMILIES.keys() == TESTED


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("Mamba", SMALL | {"state_size": 4}, LAYERS.format("linear_attention")),
        ("Rwkv", SMALL | {"attention_hidden_size": 16}, STATE),
        ("Jamba", EXPERTS | {"mamba_d_state": 4, "attn_layer_offset": 1}, LAYERS.format("linear_attention")),
        ("RecurrentGemma", WIDE, LAYERS.format("linear_attention")),
        ("Qwen3Next", WIDE | {"num_experts": 4, "moe_intermediate_size": 8}, LAYERS.format("linear_attention")),
        ("Lfm2", SMALL | {"full_attn_idxs": [1]}, LAYERS.format("conv")),
        ("GPTNeo", {"attention_types": [[["global", "local"], 1]], "num_layers": 2}, LAYERS.format("global")),
        ("Bloom", {"vocab_size": 48, "hidden_size": 16, "n_layer": 2, "n_head": 2}, PLACES),
        ("Mpt", {"vocab_size": 48, "d_model": 16, "n_layers": 2, "n_heads": 2}, PLACES),
        ("Falcon", SMALL | {"alibi": True}, PLACES),
        (
            "Bert",
            SMALL | {"max_position_embeddings": 128},
            "it gives a tree's answers other log-probabilities than separate sequences",
        ),
    ],
)
def test_models_that_see_more_than_a_path(name: str, settings: dict[str, Any], reason: str) -> None:
    usual = {"GPTNeo": {"vocab_size": 48, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16}}
    model = built(name, usual.get(name, {}) | settings, ending="LMHeadModel" if name == "Bert" else "ForCausalLM")
    assert why_no_trees(model, 8) == reason


@pytest.mark.parametrize(
    ("family", "settings", "enough", "reason"),
    [
        ("mistral", {}, 16, "its sliding_window of 16 tokens is shorter than a sequence of 17"),
        ("qwen2", {}, 16, "its sliding_window of 16 tokens is shorter than a sequence of 17"),
        ("qwen2", {"use_sliding_window": False}, 1000, None),
        ("qwen3", {"use_sliding_window": False, "sliding_window": 4}, 1000, None),
        ("gemma2", {}, 16, "its sliding_window of 16 tokens is shorter than a sequence of 17"),
        ("gemma3_text", {}, 16, "its sliding_window of 16 tokens is shorter than a sequence of 17"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 2}, 1000, None),
        ("phi3", {"sliding_window": 7}, 7, "its sliding_window of 7 tokens is shorter than a sequence of 8"),
        ("mistral", {"sliding_window": None}, 1000, None),
        (
            "mistral",
            {"per_layer_config": {1: {"sliding_window": 9}}},
            9,
            "its sliding_window of 9 tokens is shorter than a sequence of 10",
        ),
        ("llama", {}, 1000, None),
        ("gpt2", {}, 64, "its table of 64 positions is shorter than a sequence of 65"),
        ("opt", {}, 64, "its table of 64 positions is shorter than a sequence of 65"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
            64,
            "its rotary positions (dynamic) change beyond 64 tokens, and a sequence has 65",
        ),
        (
            "phi3",
            {"original_max_position_embeddings": 32, "rope_parameters": LONGROPE},
            32,
            "its rotary positions (longrope) change beyond 32 tokens, and a sequence has 33",
        ),
    ],
)
def test_sequences_that_are_too_long(family: str, settings: dict[str, Any], enough: int, reason: str | None) -> None:
    model = make(family, attention="eager", **settings)
    assert why_no_trees(model, enough) is None
    assert why_no_trees(model, enough + 1) == reason


def test_chunks_that_are_too_short() -> None:
    settings = EXPERTS | {
        "head_dim": 8,
        "intermediate_size_mlp": 16,
        "attention_chunk_size": 16,
        "no_rope_layers": [1, 0],
    }
    model = built("Llama4", settings, "Llama4TextConfig")
    assert why_no_trees(model, 16) is None
    assert why_no_trees(model, 17) == "its attention_chunk_size of 16 tokens is shorter than a sequence of 17"


def test_models_that_are_no_causal_language_models() -> None:
    t5 = {"vocab_size": 48, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    assert why_no_trees(built("T5", t5, ending="ForConditionalGeneration"), 8) == "it is an encoder-decoder model"
    bare = LlamaModel(make("llama").config)
    assert why_no_trees(bare, 8) == "it has no output head that can be told where to run"
    seeing = make("gemma3_text", use_bidirectional_attention=True)
    assert why_no_trees(seeing, 8) == "it is not causal: its tokens see later ones"


def test_attention_without_a_mask() -> None:
    model = make("llama")
    model.config._attn_implementation = "flash_attention_2"
    reason = "its attention 'flash_attention_2' takes no mask: load it with attn_implementation='sdpa'"
    assert why_no_trees(model, 8) == reason
    model.config._attn_implementation = "flex_attention"
    assert why_no_trees(model, 8) is None


def test_adapters() -> None:
    lora = peft.get_peft_model(make("mistral"), peft.LoraConfig(target_modules=["q_proj"]))
    assert why_no_trees(lora, 16) is None
    assert why_no_trees(lora, 17) == "its sliding_window of 16 tokens is shorter than a sequence of 17"
    for config in (peft.PrefixTuningConfig, peft.PromptTuningConfig):
        model = peft.get_peft_model(make("llama"), config(task_type="CAUSAL_LM", num_virtual_tokens=3))
        reason = f"its adapter ({config().peft_type.value}) puts virtual tokens before the prompt"
        assert why_no_trees(model, 8) == reason
        assert why_no_trees(Wrapper(model), 8) == reason


class Wrapper(nn.Module):
    """As distributed training wraps a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        return self.module(**inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "settings"), [("Olmo2", SMALL), ("Mixtral", EXPERTS), ("StableLm", SMALL)])
def test_other_models_are_tried_out(name: str, settings: dict[str, Any], dtype: torch.dtype) -> None:
    """Deep enough for the rounding of bfloat16 to add up."""
    model = built(name, settings | {"num_hidden_layers": 8}).to(dtype)
    assert model.config.model_type not in TESTED
    assert why_no_trees(model, 8) is None


def test_a_model_whose_forward_fails() -> None:
    """Mixtral's loss for the balance of experts cannot count tokens by such a mask."""
    reason = why_no_trees(built("Mixtral", EXPERTS | {"output_router_logits": True}), 8)
    assert reason is not None
    assert reason.startswith("its forward fails with a tree (RuntimeError: The size of tensor")
    assert "\n" not in reason


class Blind(LlamaForCausalLM):
    """Takes a mask and forgets it."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, **inputs):
        return super().forward(input_ids, position_ids=position_ids, **inputs)


class Counting(LlamaForCausalLM):
    """Takes positions and counts places in the row."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, **inputs):
        return super().forward(input_ids, attention_mask, torch.arange(input_ids.shape[1])[None], **inputs)


class Leaking(LlamaForCausalLM):
    """Each token also gets a little of the one before it in the row."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, **inputs):
        embedded = self.get_input_embeddings()(input_ids)
        embedded = embedded + 0.3 * embedded.roll(1, dims=1)
        return super().forward(None, attention_mask, position_ids, inputs_embeds=embedded, **inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Blind, Counting, Leaking])
def test_mistakes_are_found_out(kind: type[LlamaForCausalLM], dtype: torch.dtype) -> None:
    model = make("llama", dtype, model_type="unheard of")
    assert why_no_trees(model, 8) is None
    mistaken = kind(model.config).to(dtype).eval()
    mistaken.load_state_dict(model.state_dict())
    assert [trees_are_exact(mistaken, seed) for seed in range(3)] == [False] * 3
    assert why_no_trees(mistaken, 8) == "it gives a tree's answers other log-probabilities than separate sequences"


def test_trying_out_leaves_no_trace() -> None:
    """Of two layers one trains with dropout; the other does not."""
    model = built("GPT2", GPT2 | {"attn_pdrop": 0.9, "resid_pdrop": 0.9}, ending="LMHeadModel")
    model.transformer.h[0].train()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert trees_are_exact(model)
    assert [module.training for module in model.modules()] == modes
    assert all(value.grad is None for value in model.parameters())
    assert torch.equal(torch.rand(3), expected)
