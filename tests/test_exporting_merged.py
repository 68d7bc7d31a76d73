"""Merged weights: what they compute, what rounding took from them, and that nothing else is touched."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM, PreTrainedModel

import rankwise as rw
import tiny
from rankwise import MiloraConfig, SoraConfig
from rankwise.errors import UserError
from rankwise.ranks import gates


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def half_base(config: type[LoraConfig], **settings) -> peft.PeftModel:
    """A trained adapter in float32 on a base in bfloat16."""
    torch.manual_seed(1)
    chosen = {"r": 4, "lora_alpha": 6, "target_modules": tiny.TARGETS["llama"]}
    return tiny.train(peft.get_peft_model(tiny.make("llama", torch.bfloat16), config(**chosen | settings)))


def exact_updates(model: peft.PeftModel) -> dict[str, torch.Tensor]:
    return tiny.dense_updates(copy.deepcopy(model).double())


def pointers(model: peft.PeftModel) -> dict[str, int]:
    return {name: value.data_ptr() for name, value in model.state_dict().items()}


KINDS = [
    (LoraConfig, {}),
    (LoraConfig, {"use_dora": True}),
    (MiloraConfig, {"use_rslora": True}),
    (MiloraConfig, {"use_dora": True}),
    (SoraConfig, {}),
]


@pytest.mark.parametrize(("config", "settings"), KINDS, ids=["lora", "dora", "milora", "milora with dora", "sora"])
def test_a_bfloat16_merge_is_rounded_once_and_its_loss_is_known(tmp_path, config, settings):
    """Each weight is W + update in float64, rounded to bfloat16; the errors are those of the weights in the file."""
    model = half_base(config, **settings)
    exact, base = exact_updates(model), tiny.base_weights(model)
    report = rw.export(model, tmp_path / "merged", layout="merged")
    written = load_file(tmp_path / "merged" / "model.safetensors")
    lost = whole = 0.0
    for name, update in exact.items():
        weight, old = written[f"{name}.weight"], base[f"{name}.weight"]
        assert weight.dtype == torch.bfloat16
        torch.testing.assert_close(weight, (old.double() + update).bfloat16(), rtol=2**-8, atol=0)
        assert (weight != (old.double() + update).bfloat16()).float().mean() < 0.01
        error = float((weight.double() - old.double() - update).norm())
        assert report.module_errors[name] == pytest.approx(error / float(update.norm()), rel=1e-4)
        lost, whole = lost + error**2, whole + float(update.square().sum())
    assert report.relative_error == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    assert 1e-4 < report.relative_error < 1
    for name in base.keys() - {f"{layer}.weight" for layer in exact}:
        assert torch.equal(written[name], base[name])


@pytest.mark.parametrize(("config", "settings"), KINDS, ids=["lora", "dora", "milora", "milora with dora", "sora"])
def test_the_model_is_not_touched(tmp_path, config, settings):
    model = half_base(config, **settings).eval()
    before, places = {name: value.clone() for name, value in model.state_dict().items()}, pointers(model)
    logits = tiny.logits(model)
    rw.export(model, tmp_path / "merged", layout="merged")
    assert pointers(model) == places
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(tiny.logits(model), logits)
    assert not any(layer.merged for layer in tiny.layers(model).values())
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
    }


def test_only_adapted_weights_are_copied(tmp_path, monkeypatch):
    """What is handed to be saved shares every number with the model but those that the merge changed."""
    model = half_base(MiloraConfig)
    places, saved = pointers(model.get_base_model()), {}

    def remember(self: PreTrainedModel, *_: object, **__: object) -> None:
        saved.update(pointers(self))

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", remember)
    rw.export(model, tmp_path / "merged", layout="merged")
    own = {name for name, place in saved.items() if place not in places.values()}
    assert own == {f"{name}.weight" for name in tiny.layers(model)}


def test_ranks_are_those_of_the_updates_before_rounding(tmp_path):
    model = tiny.adapted("llama", SoraConfig)
    for number, gate in enumerate(gates(model).values()):
        gate.data[: max(4 - number, 0)] = 0
    names = list(tiny.layers(model))
    ranks = rw.export(model, tmp_path / "sora", layout="merged").ranks
    assert [ranks.get(name, 0) for name in names] == [0, 1, 2, 3, 4, 4]
    assert set(rw.export(half_base(MiloraConfig), tmp_path / "milora", layout="merged").ranks.values()) == {8}
    full = rw.export(half_base(LoraConfig, use_dora=True), tmp_path / "dora", layout="merged").ranks
    assert full["model.layers.0.self_attn.q_proj"] == 16 and full["model.layers.0.self_attn.v_proj"] == 8


CASES = {
    "classifier": ("bert", MiloraConfig, {"task_type": "SEQ_CLS"}),
    "biases": ("bert", LoraConfig, {"bias": "all"}),
    "MiLoRA on an embedding": ("llama", MiloraConfig, {"target_modules": ["embed_tokens", "q_proj"]}),
    "SoRA on an embedding": ("llama", SoraConfig, {"target_modules": ["embed_tokens", "q_proj"]}),
    "bias of B": ("bert", LoraConfig, {"lora_bias": True}),
    "trained tokens": ("llama", LoraConfig, {"trainable_token_indices": [5, 7]}),
    "embedding": ("llama", LoraConfig, {"target_modules": ["embed_tokens", "q_proj"]}),
    "pissa": ("llama", LoraConfig, {"init_lora_weights": "pissa"}),
    "dora on Conv1D": ("gpt2", LoraConfig, {"use_dora": True}),
    "tied embedding": ("gpt2", LoraConfig, {"target_modules": ["wte", "c_attn"]}),
    "tied head": ("gpt2", LoraConfig, {"target_modules": ["lm_head", "c_attn"]}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_written_model_computes_the_same(tmp_path, name):
    family, config, settings = CASES[name]
    model = tiny.adapted(family, config, **settings).eval()
    before = tiny.base_weights(model)
    report = rw.export(model, tmp_path / "merged", layout="merged")
    kind = AutoModelForSequenceClassification if family == "bert" else AutoModelForCausalLM
    loaded = kind.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(tiny.logits(loaded), tiny.logits(model), atol=1e-4, rtol=0)
    assert float((tiny.logits(loaded) - tiny.logits(tiny.make(family))).abs().max()) > 1e-2
    assert all(torch.equal(value, before[key]) for key, value in tiny.base_weights(model).items())
    assert report.parameters == sum(weight.numel() for weight in loaded.parameters())


@pytest.mark.parametrize("target", ["wte", "lm_head"])
def test_a_tied_weight_changes_in_the_adapted_place_alone(tmp_path, target):
    model = tiny.adapted("gpt2", LoraConfig, target_modules=[target])
    assert model.get_base_model().config.tie_word_embeddings
    rw.export(model, tmp_path / "merged", layout="merged")
    assert model.get_base_model().config.tie_word_embeddings
    weights, old = load_file(tmp_path / "merged" / "model.safetensors"), tiny.make("gpt2").lm_head.weight
    names = {"wte": "transformer.wte.weight", "lm_head": "lm_head.weight"}
    assert not torch.equal(weights[names.pop(target)], old)
    assert torch.equal(weights[next(iter(names.values()))], old)


def test_of_two_adapters_the_active_one_is_merged(tmp_path):
    model = tiny.adapted("llama", MiloraConfig)
    model.add_adapter("second", MiloraConfig(r=2, target_modules=["q_proj", "k_proj"]))
    model.set_adapter("second")
    tiny.train(model)
    report = rw.export(model, tmp_path / "merged", layout="merged")
    assert {name.rpartition(".")[2] for name in report.module_errors} == {"q_proj", "k_proj"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(tiny.logits(loaded), tiny.logits(model), atol=1e-4, rtol=0)
    assert model.active_adapters == ["second"]


def test_a_crash_while_writing_leaves_the_earlier_one_and_the_model(tmp_path, monkeypatch):
    model = half_base(MiloraConfig)
    rw.export(model, tmp_path / "merged", layout="merged")
    before, logits, places = contents(tmp_path), tiny.logits(model), pointers(model)
    save = PreTrainedModel.save_pretrained

    def crash(self: PreTrainedModel, folder: Path, **settings: object) -> None:
        save(self, folder, **settings)
        raise OSError("no space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", crash)
    for folder in ("merged", "other"):
        with pytest.raises(OSError, match="no space left"):
            rw.export(tiny.train(model), tmp_path / folder, layout="merged")
    assert contents(tmp_path) == before
    assert pointers(model) == places and not torch.equal(tiny.logits(model), logits)


def merged_already() -> peft.PeftModel:
    model = tiny.adapted("llama")
    model.merge_adapter()
    return model


def quantised() -> peft.PeftModel:
    model = tiny.adapted("llama")
    model.get_base_model().hf_quantizer = object()
    return model


def offloaded() -> peft.PeftModel:
    model = tiny.adapted("llama")
    tiny.layers(model)["model.layers.1.mlp.down_proj"].base_layer.to("meta")
    return model


def infinite() -> peft.PeftModel:
    model = half_base(LoraConfig, use_dora=True)
    tiny.layers(model)["model.layers.1.mlp.down_proj"].lora_magnitude_vector["default"].weight.data[3] = torch.inf
    return model


def too_large() -> peft.PeftModel:
    model = tiny.adapted("llama")
    model.get_base_model().half()
    tiny.layers(model)["model.layers.1.mlp.down_proj"].scaling["default"] = 1e9
    return model


def broken_base() -> peft.PeftModel:
    model = tiny.adapted("llama")
    tiny.layers(model)["model.layers.1.mlp.down_proj"].base_layer.weight.data[0, 0] = torch.nan
    return model


def tied_llama() -> PreTrainedModel:
    config = tiny.make("llama").config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def tied_adapters() -> peft.PeftModel:
    config = MiloraConfig(r=2, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    return tiny.train(peft.get_peft_model(tied_llama(), config))


def replicated() -> peft.PeftModel:
    return tiny.adapted("llama", MiloraConfig, layer_replication=[[0, 2], [1, 2]])


@pytest.mark.parametrize("build", [tied_adapters, replicated])
def test_what_cannot_be_merged_can_be_written_as_lora(tmp_path, build):
    model = build()
    rw.export(model, tmp_path / "adapter")
    base = tied_llama() if build is tied_adapters else tiny.make("llama")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(tiny.logits(loaded), tiny.logits(model.eval()), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (merged_already, r"model.layers.0.self_attn.q_proj: default is merged already: unmerge_adapter\(\) first"),
        (quantised, "the base is quantised: load the original base with this adapter and merge there"),
        (offloaded, "model.layers.1.mlp.down_proj: its weights are offloaded: load the whole model"),
        (infinite, "model.layers.1.mlp.down_proj: the adapter holds NaN or infinity"),
        (too_large, "model.layers.1.mlp.down_proj: its merged weight is not finite: it is too large for torch.float16"),
        (broken_base, "model.layers.1.mlp.down_proj: its merged weight is not finite"),
        (tied_adapters, "adapter 'default' has ensure_weight_tying=True: .* take layout='uniform'"),
        (replicated, r"adapter 'default' has layer_replication=\[\[0, 2\], \[1, 2\]\]: .* take layout='uniform'"),
    ],
    ids=["merged", "quantised", "offloaded", "infinite", "too large", "broken base", "tied", "replicated"],
)
def test_what_cannot_be_merged_is_refused_and_nothing_written(tmp_path, build, message):
    with pytest.raises(UserError, match=message):
        rw.export(build(), tmp_path / "merged", layout="merged")
    assert not list(tmp_path.iterdir())
