"""Each reference is what it says: compared with independent copies of the model; and mistakes are named."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import tiny
from rankwise.errors import UserError
from rankwise.preferences.reference import StartReference, choose_reference
from tiny_policies import ADAPTED, POLICIES, move, scores, two_adapters

TARGETS = tiny.TARGETS["llama"]


@pytest.mark.parametrize("name", list(POLICIES))
def test_the_start_is_what_the_policy_was(name: str) -> None:
    policy = POLICIES[name]()
    independent = copy.deepcopy(policy).eval()
    reference = choose_reference(policy)
    assert reference is not None
    assert torch.equal(scores(reference), tiny.logits(independent))  # before it moves
    reference.keep()
    move(policy)
    found = scores(reference)
    assert torch.equal(found, tiny.logits(independent))
    assert not torch.equal(found, tiny.logits(policy.eval()))
    assert torch.equal(scores(reference), found)


def test_what_is_kept_of_an_adapter_is_the_adapter_alone() -> None:
    """Four bytes a number: the trained weights, and buffers, of which this model has the rotary frequencies."""
    for policy in (tiny.adapted("llama"), tiny.make("llama")):
        trained = sum(value.numel() for value in policy.parameters() if value.requires_grad)
        buffers = sum(value.numel() for value in policy.buffers() if value.is_floating_point())
        reference = choose_reference(policy)
        assert reference is not None
        assert reference.keep() == 4 * (trained + buffers)
    everything = sum(value.numel() for value in policy.parameters())
    assert trained == everything and buffers < 10


def test_only_a_start_has_something_to_keep() -> None:
    policy = two_adapters()
    for made in (choose_reference(policy, "base"), choose_reference(policy, adapter="sft")):
        assert made is not None and made.keep() == 0


def test_a_start_that_is_kept_again_is_what_the_policy_is_then() -> None:
    policy = tiny.adapted("llama")
    reference = StartReference(policy)
    reference.keep()
    move(policy)
    moved = copy.deepcopy(policy).eval()
    reference.keep()
    move(policy)
    assert torch.equal(scores(reference), tiny.logits(moved))


def test_a_buffer_that_moves_while_training_is_put_back() -> None:
    policy = tiny.adapted("llama")
    policy.register_buffer("mean", torch.zeros(3))
    reference = StartReference(policy)
    reference.keep()
    policy.mean.add_(1)
    with reference.active():
        assert policy.mean.tolist() == [0, 0, 0]
    assert policy.mean.tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", ADAPTED)
def test_the_base_is_the_base_to_the_bit(name: str) -> None:
    policy = POLICIES[name]()
    reference = choose_reference(policy, "base")
    assert reference is not None
    move(policy)
    found = scores(reference)
    assert torch.equal(found, tiny.logits(tiny.make("llama")))
    assert not torch.equal(found, tiny.logits(policy.eval()))


def test_the_base_of_trained_prompts() -> None:
    policy = get_peft_model(tiny.make("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    reference = choose_reference(policy, "base")
    assert reference is not None
    assert torch.equal(scores(reference), tiny.logits(tiny.make("llama")))


def test_another_adapter_is_that_adapter() -> None:
    policy = two_adapters()
    independent = copy.deepcopy(policy).eval()
    independent.set_adapter("sft")
    reference = choose_reference(policy, adapter="sft")
    assert reference is not None
    move(policy)
    found = scores(reference)
    assert torch.equal(found, tiny.logits(independent))
    assert not torch.equal(found, tiny.logits(policy.eval()))


def test_a_separate_model_is_made_ready_and_is_left_as_it_is() -> None:
    other = tiny.adapted("llama", lora_dropout=0.4).train()
    expected = tiny.logits(copy.deepcopy(other).eval())
    reference = choose_reference(tiny.make("llama"), ref_model=other)
    assert reference is not None and reference.model is other
    assert not any(value.requires_grad for value in other.parameters())
    assert not any(module.training for module in other.modules())
    assert torch.equal(scores(reference), expected)


def test_a_separate_model_goes_to_the_device_of_the_policy() -> None:
    policy = tiny.make("llama")
    reference = choose_reference(policy, ref_model=tiny.make("llama"))
    assert reference is not None
    policy.to("meta")
    with reference.active() as model:
        assert {value.device.type for value in model.parameters()} == {"meta"}


def test_without_a_reference_there_is_none() -> None:
    assert choose_reference(tiny.make("llama"), "none") is None


def test_adapters_that_are_on_are_known() -> None:
    policy = two_adapters()
    found = {
        "start": choose_reference(policy),
        "base": choose_reference(policy, "base"),
        "adapter": choose_reference(policy, adapter="sft"),
        "model": choose_reference(tiny.make("llama"), ref_model=policy),
        "plain": choose_reference(tiny.make("llama")),
    }
    assert {name: made.adapters for name, made in found.items() if made is not None} == {
        "start": ("default",),
        "base": (),
        "adapter": ("sft",),
        "model": ("default",),
        "plain": (),
    }


MISTAKES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "unknown source": (
        two_adapters,
        {"source": "begin"},
        "reference='begin' is unknown: start, base, none are possible",
    ),
    "two references": (
        two_adapters,
        {"adapter": "sft", "ref_model": tiny.make("llama")},
        "reference_adapter='sft' and ref_model are 2 references: give one of them",
    ),
    "none and one": (
        two_adapters,
        {"source": "none", "adapter": "sft"},
        "reference='none' and reference_adapter='sft'",
    ),
    "unknown adapter": (
        two_adapters,
        {"adapter": "other"},
        "reference_adapter='other' is no adapter of the model: known: default, sft",
    ),
    "misspelt adapter": (two_adapters, {"adapter": "stf"}, "did you mean 'sft'?"),
    "the trained adapter": (
        two_adapters,
        {"adapter": "default"},
        "reference_adapter='default' is the adapter that is trained, and would move with it",
    ),
    "base of a plain model": (
        lambda: tiny.make("llama"),
        {"source": "base"},
        "reference 'base' needs a model with an adapter to disable: use 'start' or give ref_model",
    ),
    "adapter of a plain model": (
        lambda: tiny.make("llama"),
        {"adapter": "sft"},
        "a model with an adapter is needed, not LlamaForCausalLM",
    ),
    "base with trained biases": (
        lambda: tiny.adapted("gpt2", bias="all"),
        {"source": "base"},
        "belongs to no adapter (13 such weights; bias='all' or 'lora_only' does that), so that reference='base' would",
    ),
    "another vocabulary": (
        two_adapters,
        {"ref_model": GPT2LMHeadModel(GPT2Config(vocab_size=1234, n_embd=8, n_layer=1, n_head=1, n_positions=8))},
        "ref_model has a vocabulary of 1,234 tokens and the model one of 48",
    ),
}


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers")
@pytest.mark.parametrize("name", list(MISTAKES))
def test_mistakes_are_named(name: str) -> None:
    make, arguments, message = MISTAKES[name]
    with pytest.raises(UserError, match=re.escape(message)):
        choose_reference(make(), **arguments)


def test_a_separate_model_that_is_the_policy_is_refused() -> None:
    """get_peft_model puts the adapter into the model that it is given."""
    base = tiny.make("llama")
    policy = get_peft_model(base, LoraConfig(target_modules=TARGETS))
    message = r"ref_model shares 12 trained weights with the model \(.*lora_A.default.weight\), and would move with it"
    with pytest.raises(UserError, match=message):
        choose_reference(policy, ref_model=base)
    assert all(value.requires_grad for name, value in policy.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("arguments", [{"source": "base"}, {"adapter": "sft"}])
def test_a_base_that_is_trained_or_merged_is_refused(arguments: dict[str, Any]) -> None:
    policy = two_adapters()
    unfrozen = next(value for name, value in policy.named_parameters() if "k_proj" in name)
    unfrozen.requires_grad = True
    with pytest.raises(UserError, match=r"k_proj.weight is trained and belongs to no adapter \(1 such weights"):
        choose_reference(policy, **arguments)
    unfrozen.requires_grad = False
    policy.merge_adapter()
    with pytest.raises(
        UserError, match=r"q_proj: default is merged into its weight, so that reference.* not to be had"
    ):
        choose_reference(policy, **arguments)


def test_adapters_that_transformers_keeps_inside_a_model() -> None:
    """They may be a start; which they are is not to be told apart, and is asked for by a cache alone."""
    policy = tiny.make("llama")
    policy.add_adapter(LoraConfig(target_modules=TARGETS))
    reference = choose_reference(policy)
    assert reference is not None
    with pytest.raises(UserError, match="added by its own add_adapter or load_adapter"):
        _ = reference.adapters
