"""Small models with seeded random weights, and a few training steps, for tests of adapters."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from rankwise import MiloraConfig
from rankwise.directions import load_checkpoint

IDS = torch.tensor([[1, 5, 9, 2, 30, 7, 7, 12], [3, 8, 40, 11, 2, 6, 25, 1]])
LABELS = torch.tensor([0, 2])

# A few modules of each family: plain Linear, GPT-2's transposed Conv1D, and Linear with a bias.
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"], "bert": ["query", "value"]}


def make(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of two layers; the same weights at every call."""
    torch.manual_seed(0)
    model: PreTrainedModel
    if family == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=48,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=32,
                initializer_range=0.2,
            )
        )
    elif family == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=48, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.2)
        )
    else:
        model = BertForSequenceClassification(
            BertConfig(
                vocab_size=48,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=32,
                initializer_range=0.2,
                num_labels=3,
            )
        )
    return model.eval().to(dtype)


def real(folder: Path) -> PreTrainedModel:
    """The small pretrained Llama among the real data."""
    return AutoModelForCausalLM.from_pretrained(folder / "stories260K" / "hf", dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids).logits


def loss(model: nn.Module) -> Tensor:
    sentence_labels = "Sequence" in type(model.get_base_model()).__name__
    return model(input_ids=IDS, labels=LABELS if sentence_labels else IDS).loss


def train(model: nn.Module, steps: int = 3, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """A few steps in evaluation mode, so that nothing is random."""
    if optimizer is None:
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(steps):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The adapted layers by their names in the base model."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights that are no adapter's, by their names in the base model."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {
        name.replace(".base_layer.", "."): value.clone()
        for name, value in base.state_dict().items()
        if ".lora_" not in name
    }


def dense_updates(model: nn.Module) -> dict[str, Tensor]:
    """Each layer's update in float64 as (out, in), measured from its outputs on the unit vectors of its input."""
    found = {}
    for name, layer in layers(model).items():
        base = layer.get_base_layer()
        if isinstance(base, nn.Embedding):
            inputs = torch.arange(base.num_embeddings)
        else:
            inputs = torch.eye(layer.in_features, dtype=next(layer.parameters()).dtype)
        with torch.no_grad():
            found[name] = (layer(inputs) - base(inputs)).double().T
    return found


@torch.no_grad()
def logits_of_rows(model: nn.Module, adapters: list[str]) -> Tensor:
    """Logits with an adapter for each row of the batch."""
    return model(input_ids=IDS, adapter_names=adapters).logits


def adapted(family: str, config: type[LoraConfig] = LoraConfig, **settings) -> PeftModel:
    """A trained adapter of any kind."""
    chosen = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[family], "fan_in_fan_out": family == "gpt2"}
    torch.manual_seed(1)
    return train(get_peft_model(make(family), config(**chosen | settings)))


def milora(base: nn.Module, family: str = "llama", **settings) -> PeftModel:
    """A new MiLoRA adapter of rank 4 on a base."""
    chosen = {"r": 4, "target_modules": TARGETS[family], "fan_in_fan_out": family == "gpt2"}
    return get_peft_model(base, MiloraConfig(**chosen | settings))


def resume(base: nn.Module, folder: Path, **settings) -> PeftModel:
    """A MiLoRA checkpoint on a base, to train on."""
    return load_checkpoint(base, folder, **{"is_trainable": True} | settings)


def assert_same_adapter(model: nn.Module, other: nn.Module) -> None:
    """Factors and frozen starts of all adapters are the same bits."""
    expected, found = ({k: v for k, v in one.state_dict().items() if ".lora_" in k} for one in (model, other))
    assert expected.keys() == found.keys() and any("lora_start" in name for name in found)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
