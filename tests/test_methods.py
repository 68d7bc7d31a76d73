"""Every method on a decoder, an encoder and an encoder-decoder: it trains, saves, loads and merges where it can."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AlbertConfig,
    AutoModel,
    BloomConfig,
    FalconConfig,
    GPTJConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import rankwise
import tiny
from rankwise.adapters import load_adapter_folder
from rankwise.errors import UserError
from rankwise.generation import generate_answers
from rankwise.likelihood import answer_log_probabilities
from rankwise.methods import base_of, load_stage, save_stage, with_adapter
from rankwise.methods.bottleneck import BottleneckConfig, BottleneckLayer
from rankwise.schema import METHODS
from rankwise.tokenise import pad_left
from tiny_methods import AUTO, KINDS, base, inputs, logits, recipe, train


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_trains_saves_loads_and_merges(method: str, kind: str, tmp_path: Path) -> None:
    wanted, task_type = recipe(method), KINDS[kind]
    before = logits(base(kind), kind)
    torch.manual_seed(1)
    model = with_adapter(base(kind), wanted, task_type)
    losses = train(model, kind, wanted)
    assert losses[-1] < losses[0]
    trained = logits(model, kind)
    own = [name for name, weight in model.named_parameters() if weight.requires_grad and "modules_to_save" not in name]
    assert own  # more than a classifier's head is trained

    with base_of(model):
        torch.testing.assert_close(logits(model, kind), before, rtol=0, atol=0)
    torch.testing.assert_close(logits(model, kind), trained, rtol=0, atol=0)

    save_stage(model, tmp_path / "stage")
    again = with_adapter(base(kind), wanted, task_type, tmp_path / "stage")
    load_stage(again, tmp_path / "stage")
    torch.testing.assert_close(logits(again, kind), trained, rtol=1e-5, atol=1e-5)

    layouts = wanted.adapter.layouts
    assert METHODS[method].merges == ("merged" in layouts)
    for layout in set(layouts) - {"merged"}:
        rankwise.export(model, tmp_path / layout, layout=layout)
        loaded = PeftModel.from_pretrained(base(kind), tmp_path / layout)
        torch.testing.assert_close(logits(loaded, kind), trained, rtol=1e-4, atol=1e-4)
    if "merged" in layouts:
        rankwise.export(model, tmp_path / "merged", layout="merged")
        whole = AUTO[task_type].from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(logits(whole, kind), trained, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits(model, kind), trained, rtol=0, atol=0)
    else:
        with pytest.raises(UserError, match="take layout='own'"):
            rankwise.export(model, tmp_path / "merged", layout="merged")


@pytest.mark.parametrize("method", ["prompt", "prefix", "houlsby", "bitfit", "full", "vera"])
def test_the_methods_own_weights_learn(method: str) -> None:
    model = with_adapter(base("encoder"), recipe(method), "SEQ_CLS")
    if method in ("houlsby", "vera"):  # zero at first, so that only the second step reaches all of it
        train(model, "encoder", recipe(method), 1)
    model(**inputs("encoder")).loss.backward()
    own = {name: w for name, w in model.named_parameters() if w.requires_grad and "modules_to_save" not in name}
    reached = [name for name, weight in own.items() if weight.grad is not None and weight.grad.any()]
    beside = [name for name in own if name not in reached]
    assert all("embeddings" in name or "key" in name or "original_module" in name for name in beside), beside


# Which modules a bottleneck follows


@pytest.mark.parametrize(
    ("placement", "ends"),
    [("houlsby", {"attention.output.dense", "layer.output.dense"}), ("pfeiffer", {"layer.output.dense"})],
)
def test_bottlenecks_of_bert(placement: str, ends: set[str]) -> None:
    model = with_adapter(tiny.make("bert"), recipe(placement), "SEQ_CLS")
    found = {name for name, module in model.named_modules() if isinstance(module, BottleneckLayer)}
    layers = {f"base_model.model.bert.encoder.layer.{n}.{end.removeprefix('layer.')}" for n in (0, 1) for end in ends}
    assert found == layers


@pytest.mark.parametrize(
    ("config", "places"),
    [
        (BloomConfig(n_layer=2, hidden_size=16, n_head=2, vocab_size=48), 4),
        (FalconConfig(num_hidden_layers=2, hidden_size=16, num_attention_heads=2, vocab_size=48), 4),
        (GPTJConfig(n_layer=2, n_embd=16, n_head=2, rotary_dim=4, vocab_size=48), 4),
        (AlbertConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2, vocab_size=48), 2),  # of one layer
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
def test_both_places_are_found_in_other_families(config: PreTrainedConfig, places: int, placement: str) -> None:
    model = get_peft_model(AutoModel.from_config(config), BottleneckConfig(placement=placement))
    found = [name for name, module in model.named_modules() if isinstance(module, BottleneckLayer)]
    assert len(found) == (places if placement == "houlsby" else places / 2)
    closing = [name for name in found if name.endswith(("mlp.dense_4h_to_h", "mlp.fc_out", "ffn_output"))]
    assert len(closing) == places / 2
    assert all(re.search(r"attention\.dense$|attn\.out_proj$", name) for name in set(found) - set(closing))


def test_bottlenecks_of_t5_follow_attention_across_too() -> None:
    model = with_adapter(t5(), recipe("houlsby"), "SEQ_2_SEQ_LM")
    found = [name for name, module in model.named_modules() if isinstance(module, BottleneckLayer)]
    assert len(found) == 2 * 2 + 2 * 3


def test_a_bottleneck_adds_its_equation() -> None:
    torch.manual_seed(0)
    layer = BottleneckLayer(torch.nn.Linear(6, 5), "default", BottleneckConfig(size=3, activation="tanh"))
    down, up, x = layer.bottleneck_down["default"], layer.bottleneck_up["default"], torch.randn(2, 6)
    for weight in (*down.parameters(), *up.parameters()):
        torch.nn.init.normal_(weight)
    hidden = layer.base_layer(x)
    by_hand = torch.tanh(hidden @ down.weight.T + down.bias) @ up.weight.T + up.bias
    torch.testing.assert_close(layer(x), hidden + by_hand)


def test_two_adapters_of_bottlenecks_take_turns() -> None:
    model = with_adapter(tiny.make("bert"), recipe("houlsby"), "SEQ_CLS")
    train(model, "encoder", recipe("houlsby"))
    first = logits(model, "encoder")
    model.add_adapter("other", BottleneckConfig(size=2, task_type="SEQ_CLS"))
    model.set_adapter("other")
    assert not torch.equal(logits(model, "encoder"), first)
    model.set_adapter("default")
    torch.testing.assert_close(logits(model, "encoder"), first, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, r"size=0\) is not possible: it must be 1 or more"),
        ({"placement": "hulsby"}, "placement='hulsby'"),
        ({"activation": "gleu"}, "activation='gleu'"),
    ],
)
def test_mistakes_in_a_bottlenecks_config(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BottleneckConfig(**settings)


def test_a_bottleneck_needs_a_module_to_follow() -> None:
    with pytest.raises(UserError, match=r"no module of Sequential is known to close a block.*target_modules"):
        import peft

        peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), BottleneckConfig())
    with pytest.raises(UserError, match=r"wte is a Embedding: a bottleneck follows Linear and Conv1D only"):
        with_adapter(tiny.make("gpt2"), recipe("houlsby", target_modules=["wte"]), "CAUSAL_LM")


def test_a_bottleneck_loads_by_another_name(tmp_path: Path) -> None:
    model = with_adapter(tiny.make("bert"), recipe("houlsby"), "SEQ_CLS")
    train(model, "encoder", recipe("houlsby"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.make("bert"), tmp_path, adapter_name="films")
    torch.testing.assert_close(logits(loaded, "encoder"), logits(model, "encoder"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_the_base_of_virtual_tokens_counts_positions_too(method: str) -> None:
    rows = [[5, 9, 2, 30], [7, 12, 3, 8, 40, 11, 2]]
    ids, mask = pad_left(rows, 0)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    plain, _ = answer_log_probabilities(tiny.make("gpt2"), batch)
    model = with_adapter(tiny.make("gpt2"), recipe(method, tokens=3), "CAUSAL_LM").eval()
    with base_of(model):
        found, _ = answer_log_probabilities(model, batch)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)


# Virtual tokens: padding and batches change nothing


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_rows_do_not_depend_on_their_batch(method: str, family: str) -> None:
    torch.manual_seed(0)
    model = with_adapter(tiny.make(family), recipe(method, tokens=3), "CAUSAL_LM").eval()
    rows = [[5, 9, 2, 30], [7, 12, 3, 8, 40, 11, 2], [6, 25]]
    ids, mask = pad_left(rows, 0)
    labels = ids.masked_fill(mask == 0, -100)
    together, _ = answer_log_probabilities(model, {"input_ids": ids, "attention_mask": mask, "labels": labels})
    for number, row in enumerate(rows):
        one = torch.tensor([row])
        alone, _ = answer_log_probabilities(
            model, {"input_ids": one, "attention_mask": torch.ones_like(one), "labels": one}
        )
        torch.testing.assert_close(together[number, -len(row) + 1 :], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_what_is_written_does_not_depend_on_the_batch(method: str, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    torch.manual_seed(0)
    model = with_adapter(tiny_llama, recipe(method, tokens=3), "CAUSAL_LM").eval()
    prompts = [tiny_tokenizer(text)["input_ids"] for text in ("The film", "A much longer prompt than the others", "I")]
    together = generate_answers(model, tiny_tokenizer, prompts, 6)
    assert together == [generate_answers(model, tiny_tokenizer, [prompt], 6)[0] for prompt in prompts]


# What a model cannot carry


def t5() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=48, decoder_start_token_id=0, **sizes)).eval()


def test_a_model_without_biases_has_no_bitfit() -> None:
    for model, task_type in ((tiny.make("llama"), "CAUSAL_LM"), (t5(), "SEQ_2_SEQ_LM")):
        kind = type(model).__name__
        with pytest.raises(UserError, match=f"bitfit trains biases, and {kind} has none: take another method"):
            with_adapter(model, recipe("bitfit"), task_type)


def test_prompts_of_a_classifier_that_reads_the_last_token() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=48, **sizes))
    with pytest.raises(UserError, match="prompt does not go with LlamaForSequenceClassification"):
        with_adapter(model, recipe("prompt"), "SEQ_CLS")


def test_plain_lora_of_what_has_none(tmp_path: Path) -> None:
    model = with_adapter(tiny.make("llama"), recipe("vera"), "CAUSAL_LM")
    with pytest.raises(UserError, match=r"\(VeraConfig\) has no LoRA layers.*layout='own', or 'merged'"):
        rankwise.export(model, tmp_path / "adapter")


def test_a_whole_model_that_is_not_this_one(tmp_path: Path) -> None:
    tiny.make("llama").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"the whole model in .* cannot be loaded"):
        load_stage(with_adapter(tiny.make("gpt2"), recipe("full"), "CAUSAL_LM"), tmp_path)


@pytest.mark.parametrize(
    ("method", "changed"), [("houlsby", {"size": 2}), ("prompt", {"tokens": 2}), ("vera", {"r": 2})]
)
def test_a_classifiers_folder_has_the_classes_of_its_head(method: str, changed: dict[str, int], tmp_path: Path) -> None:
    """Not the rows of the method's own matrices, which are fewer here."""
    tiny.make("bert").save_pretrained(tmp_path / "base")
    model = with_adapter(tiny.make("bert"), recipe(method, **changed), "SEQ_CLS")
    train(model, "encoder", recipe(method))
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_adapter_folder(tmp_path / "adapter", str(tmp_path / "base"))
    torch.testing.assert_close(logits(loaded, "encoder"), logits(model, "encoder"), rtol=1e-4, atol=1e-4)
