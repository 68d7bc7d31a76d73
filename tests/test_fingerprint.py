"""A fingerprint changes with all that log-probabilities depend on, and with nothing else."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

import rankwise as rw
import tiny
from rankwise.errors import UserError
from rankwise.preferences.fingerprint import fingerprint, tokenizer_label

pytestmark = pytest.mark.filterwarnings("ignore:Note that `r` is not used in AdaLora")

ON = ("default",)
KINDS: dict[str, Callable[[], PeftModel]] = {
    "lora": lambda: tiny.adapted("llama"),
    "lora with a saved head": lambda: tiny.adapted("llama", modules_to_save=["lm_head"]),
    "lora with trained tokens": lambda: tiny.adapted("llama", trainable_token_indices=[5, 9]),
    "dora": lambda: tiny.adapted("llama", use_dora=True),
    "milora": lambda: tiny.adapted("llama", rw.MiloraConfig),
    "sora": lambda: tiny.adapted("llama", rw.SoraConfig, part="minor"),
    "adalora": lambda: tiny.adapted("llama", peft.AdaLoraConfig, init_r=4, total_step=20),
    "ia3": lambda: peft.get_peft_model(
        tiny.make("llama"), peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    ),
}


def changed(tensor: torch.Tensor) -> None:
    """Its last number is the next one that float32 has."""
    flat = tensor.data.view(-1)
    flat[-1] = torch.nextafter(flat[-1], torch.tensor(torch.inf))


def test_each_weight_of_a_plain_model_counts() -> None:
    model = tiny.make("llama")
    found = {fingerprint(model)}
    for value in model.parameters():
        changed(value)
        found.add(fingerprint(model))
    assert len(found) == 1 + len(list(model.parameters())) == 22
    assert all(len(one) == 32 and int(one, 16) for one in found)


@pytest.mark.parametrize("kind", list(KINDS))
def test_each_weight_of_an_adapter_counts_where_it_is_on(kind: str) -> None:
    """Trained or not: the frozen start of MiLoRA and the counts of AdaLoRA too. The base does not move with them."""
    model = KINDS[kind]()
    base, found = fingerprint(model), {fingerprint(model, ON)}
    own = [value for name, value in (*model.named_parameters(), *model.named_buffers()) if ".default" in name]
    for value in own:
        value.requires_grad_(False)
        if value.is_floating_point():
            changed(value)
        else:
            value.add_(1)
        found.add(fingerprint(model, ON))
    assert len(found) == 1 + len(own) and len(own) >= 4
    assert fingerprint(model) == base not in found


@pytest.mark.parametrize("kind", list(KINDS))
def test_each_weight_of_an_adapted_base_counts(kind: str) -> None:
    """Whether its adapter is on or off, and as in the base alone."""
    model, plain = KINDS[kind](), tiny.make("llama")
    own = {name: value for name, value in model.named_parameters() if ".default" not in name}
    assert len(own) == len(list(plain.parameters()))
    assert fingerprint(model) == fingerprint(plain)
    for value, other in zip(own.values(), plain.parameters(), strict=True):
        on = fingerprint(model, ON)
        assert torch.equal(value, other)
        changed(value)
        assert fingerprint(model) != fingerprint(plain)
        assert fingerprint(model, ON) != on
        changed(other)
        assert fingerprint(model) == fingerprint(plain)


def test_settings_of_an_adapter_count() -> None:
    """Of the same weights: its scaling, which tokens it trains, and whether it is DoRA."""
    models = {
        "lora": tiny.adapted("llama"),
        "alpha": tiny.adapted("llama"),
        "rslora": peft.get_peft_model(tiny.make("llama"), LoraConfig(r=4, lora_alpha=6, use_rslora=True)),
        "plain": peft.get_peft_model(tiny.make("llama"), LoraConfig(r=4, lora_alpha=6)),
        "tokens": tiny.adapted("llama", trainable_token_indices=[5, 9]),
        "other tokens": tiny.adapted("llama", trainable_token_indices=[5, 9]),
    }
    for layer in tiny.layers(models["alpha"]).values():
        layer.scaling["default"] = 1.75
    for name, pair in {"plain": "rslora"}.items():
        peft.set_peft_model_state_dict(models[name], peft.get_peft_model_state_dict(models[pair]))
    tokens = models["other tokens"].base_model.model.model.embed_tokens.token_adapter
    assert tokens.token_indices == {"default": [5, 9]}
    tokens.token_indices["default"] = [5, 8]
    assert len({fingerprint(model, ON) for model in models.values()}) == len(models)


def test_arithmetic_and_config_count() -> None:
    model = tiny.make("llama")
    found = {fingerprint(model, precision=precision) for precision in (None, torch.bfloat16, torch.float16)}
    found |= {fingerprint(tiny.make("llama", dtype)) for dtype in (torch.float64, torch.bfloat16, torch.float16)}
    model.config.rms_norm_eps = 1e-5
    found.add(fingerprint(model))
    model.config.rope_parameters = {"rope_theta": 5e4, "rope_type": "default"}
    found.add(fingerprint(model))
    assert len(found) == 8


def test_what_changes_nothing_does_not_count(tmp_path: Path) -> None:
    """Modes, dropout, wrappers, other adapters and their number, names of adapters, gradients, trainers' settings of
    the config, and where the model was loaded from."""
    model = tiny.adapted("llama", lora_dropout=0.3)
    expected, base = fingerprint(model, ON), fingerprint(model)
    assert base == fingerprint(tiny.make("llama")) != expected
    model.save_pretrained(tmp_path / "adapter")
    tiny.make("llama").save_pretrained(tmp_path / "base")

    model.train()
    for layer in tiny.layers(model).values():
        layer.lora_dropout["default"] = nn.Dropout(0.9)
    model.base_model.model.config.use_cache = False
    model.base_model.model.config.pad_token_id = 3
    model.base_model.model.config.attention_dropout = 0.5
    model.add_adapter("other", LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=["lm_head"]))
    model.set_adapter("other")
    tiny.loss(model).backward()
    wrapped = nn.Module()
    wrapped.module = model  # as DistributedDataParallel has it
    assert fingerprint(model, ON) == fingerprint(wrapped, ON) == expected
    assert fingerprint(model) == fingerprint(wrapped) == base
    assert len({expected, base, fingerprint(model, ("other",)), fingerprint(model, ("default", "other"))}) == 4

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert fingerprint(loaded) == base
    again = PeftModel.from_pretrained(loaded, tmp_path / "adapter", adapter_name="sft")
    assert fingerprint(again, ("sft",)) == expected
    with again.disable_adapter():
        assert fingerprint(again, ("sft",)) == expected


def test_dropout_that_an_adapter_keeps_as_a_number_does_not_count() -> None:
    found = set()
    for dropout in (0.0, 0.5):
        torch.manual_seed(1)
        config = peft.LoHaConfig(target_modules=["q_proj"], module_dropout=dropout, rank_dropout=dropout)
        found.add(fingerprint(peft.get_peft_model(tiny.make("llama"), config), ON))
    assert len(found) == 1


def test_fingerprinting_changes_nothing() -> None:
    model = KINDS["milora"]().train()
    before = copy.deepcopy(model)
    fingerprint(model, ON)
    assert model.training and all(value.requires_grad == (".lora_" in name) for name, value in model.named_parameters())
    expected, found = before.state_dict(), model.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_tied_weights_count_once_and_by_value() -> None:
    """A head that is the embedding, and one that has the same numbers."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=8, n_layer=1, n_head=1, n_positions=8))
    expected = fingerprint(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert fingerprint(model) == expected
    changed(model.lm_head.weight)
    assert fingerprint(model) != expected


def test_buffers_that_are_saved_count_and_others_do_not() -> None:
    model = tiny.make("llama")
    model.register_buffer("kept", torch.zeros(2))
    model.register_buffer("passing", torch.zeros(2), persistent=False)
    model.register_buffer("empty", torch.zeros(0))
    expected = fingerprint(model)
    model.passing.add_(1)
    assert fingerprint(model) == expected
    model.kept.add_(1)
    assert fingerprint(model) != expected


def test_a_merged_adapter_counts_with_its_base() -> None:
    model = tiny.adapted("llama")
    before = fingerprint(model)
    model.merge_adapter()
    assert fingerprint(model) != before


def test_a_packed_base_has_one(tiny_llama: LlamaForCausalLM) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    plain = fingerprint(tiny_llama)
    quantize_(tiny_llama, Int8WeightOnlyConfig())
    found = fingerprint(tiny_llama)
    assert found == fingerprint(tiny_llama) != plain
    changed(tiny_llama.model.layers[0].self_attn.q_proj.weight.scale)
    assert fingerprint(tiny_llama) != found


def test_what_cannot_be_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    message = r"embed_tokens.weight cannot be read whole \(it is on the meta device, spread over processes or packed\)"
    with pytest.raises(UserError, match=message):
        fingerprint(tiny.make("llama").to("meta"))
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setitem(os.environ, name, value)
    torch.distributed.init_process_group("gloo")
    try:
        with pytest.raises(UserError, match=message):
            fingerprint(torch.distributed.fsdp.fully_shard(tiny.make("llama")))
    finally:
        torch.distributed.destroy_process_group()


def test_adapters_that_are_not_there_are_named() -> None:
    with pytest.raises(UserError, match="adapter 'stf' is none of the model's: known: default"):
        fingerprint(tiny.adapted("llama"), ("stf",))
    with pytest.raises(UserError, match="adapter 'sft' is none of the model's: it has none"):
        fingerprint(tiny.make("llama"), ("sft",))
    prompts = peft.get_peft_model(tiny.make("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(UserError, match="adapter 'default' is one of trained prompts, under which no log-prob"):
        fingerprint(prompts, ON)
    assert fingerprint(prompts) == fingerprint(tiny.make("llama"))


def test_a_tokenizer_in_a_few_words(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    other = copy.deepcopy(tiny_tokenizer)
    label = tokenizer_label(tiny_tokenizer)
    assert label.startswith(f"{type(tiny_tokenizer).__name__} of {len(tiny_tokenizer)} tokens, ")
    assert tokenizer_label(other) == label
    other.add_tokens(["<title>"])
    assert tokenizer_label(other) != label
