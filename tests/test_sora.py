from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

import rankwise as rw
import tiny
from rankwise.errors import UserError
from rankwise.ranks import gates

FAMILIES = list(tiny.TARGETS)


def adapt(base: nn.Module, family: str = "llama", **settings) -> peft.PeftModel:
    torch.manual_seed(1)
    return peft.get_peft_model(base, rw.SoraConfig(**{"r": 4, "target_modules": tiny.TARGETS[family]} | settings))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_computes_the_gated_product(family, rslora):
    """h = W x + s B (g * (A x)), with s = 6 / 4 or 6 / sqrt(4)."""
    model = tiny.train(adapt(tiny.make(family), family, lora_alpha=6, use_rslora=rslora))
    layer = next(iter(tiny.layers(model).values()))
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    weight = layer.get_base_layer().weight
    weight = weight.T if family == "gpt2" else weight
    bias = layer.get_base_layer().bias
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    gate = layer.lora_gate["default"]
    assert b.abs().max() > 0
    scaling = 3.0 if rslora else 1.5
    expected = x @ weight.T + scaling * (gate * (x @ a.T)) @ b.T + (0 if bias is None else bias)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_starts_as_the_base_and_never_changes_it():
    base = tiny.make("llama")
    weights, expected = tiny.base_weights(base), tiny.logits(base)
    model = adapt(base)
    assert torch.equal(tiny.logits(model), expected)
    tiny.train(model)
    assert not torch.equal(tiny.logits(model), expected)
    assert all(torch.equal(value, weights[name]) for name, value in tiny.base_weights(model).items())
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), expected)


def test_gates_start_as_drawn_or_as_ones():
    drawn = gates(adapt(tiny.make("llama"), r=64))
    values = torch.cat(list(drawn.values())).detach()
    assert list(drawn) == list(tiny.layers(adapt(tiny.make("llama"))))
    assert values.shape == (6 * 64,)
    assert abs(float(values.mean())) < 0.2 and abs(float(values.std()) - 1) < 0.15
    assert all((gate == 1).all() for gate in gates(adapt(tiny.make("llama"), gate_init="ones")).values())


def test_gates_are_trained_with_the_two_factors():
    model = adapt(tiny.make("llama"))
    trained = {part for name, p in model.named_parameters() if p.requires_grad for part in name.split(".")}
    assert {"lora_A", "lora_B", "lora_gate"} <= trained
    tiny.train(model, 1)
    tiny.loss(model).backward()
    assert all(gate.grad.abs().max() > 0 for gate in gates(model).values())


def test_gates_of_an_inactive_adapter_are_not_trained():
    model = adapt(tiny.make("llama"))
    model.add_adapter("second", rw.SoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
    assert not any(p.requires_grad for name, p in model.named_parameters() if "second" in name)
    model.set_adapter("second")
    assert sorted(gates(model)) == sorted(f"model.layers.{i}.self_attn.{m}_proj" for i in (0, 1) for m in "qk")
    assert all(gate.shape == (2,) and gate.requires_grad for gate in gates(model).values())
    assert not any(p.requires_grad for name, p in model.named_parameters() if "default" in name)


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_saves_and_loads(tmp_path, family, low_memory):
    model = tiny.train(adapt(tiny.make(family), family, threshold=1e-2, mode="reference"))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny.make(family), tmp_path, low_cpu_mem_usage=low_memory)
    config = loaded.peft_config["default"]
    assert isinstance(config, rw.SoraConfig)
    assert (config.threshold, config.mode) == (1e-2, "reference")
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    assert all(torch.equal(gate, gates(model)[name]) for name, gate in gates(loaded).items())


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_merges_and_unmerges(family, safe):
    base = tiny.make(family)
    weights = tiny.base_weights(base)
    model = tiny.train(adapt(base, family))
    expected = tiny.logits(model)
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(tiny.logits(model), expected, atol=1e-5, rtol=1e-5)
    assert any(not torch.equal(value, weights[name]) for name, value in tiny.base_weights(model).items())
    model.unmerge_adapter()
    for name, value in tiny.base_weights(model).items():
        torch.testing.assert_close(value, weights[name], atol=1e-6, rtol=1e-6)
    merged = model.merge_and_unload()
    assert not tiny.layers(merged)
    torch.testing.assert_close(tiny.logits(merged), expected, atol=1e-5, rtol=1e-5)


def test_a_bfloat16_base_has_gates_of_float32():
    """In bfloat16 a gate near 1 could not move by a threshold of 3e-4."""
    model = tiny.train(adapt(tiny.make("llama", torch.bfloat16)))
    assert {gate.dtype for gate in gates(model).values()} == {torch.float32}
    assert tiny.logits(model).dtype == torch.bfloat16


def test_rank_pattern():
    found = gates(adapt(tiny.make("llama"), rank_pattern={"down_proj": 7}))
    assert {gate.numel() for name, gate in found.items() if name.endswith("down_proj")} == {7}
    assert {gate.numel() for name, gate in found.items() if not name.endswith("down_proj")} == {4}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": -1e-3}, r"threshold=-0.001\) is not possible: it must be 0 or more"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"l1": -1.0}, r"l1=-1.0\) is not possible"),
        ({"use_dora": True}, "use_dora=True"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"init_lora_weights": "orthogonal"}, "init_lora_weights='orthogonal'"),
        ({"part": "minor", "init_lora_weights": "gaussian"}, "init_lora_weights='gaussian'"),
        ({"part": "minor", "lora_alpha": 0}, r"lora_alpha=0\) is not possible: it must be above 0"),
        ({"lora_alpha": -1}, r"lora_alpha=-1\) is not possible: it must be above 0"),
        ({"r": 0}, r"r=0\) is not possible: it must be a whole number, 1 or more"),
        ({"r": -3}, r"Config\(r=-3\)"),
        ({"r": 4.0}, r"Config\(r=4\.0\)"),
        ({"r": "4"}, r"Config\(r='4'\)"),
        ({"r": True}, r"Config\(r=True\)"),
        ({"rank_pattern": {"q_proj": 0}}, r"Config\(rank_pattern\['q_proj'\]=0\) is not possible: .* 1 or more"),
        ({"rank_pattern": {"q_proj": None}}, r"Config\(rank_pattern\['q_proj'\]=None\)"),
        ({"lora_alpha": "16"}, r"Config\(lora_alpha='16'\)"),
        ({"lora_alpha": float("nan")}, r"Config\(lora_alpha=nan\)"),
        ({"lora_alpha": float("inf")}, r"Config\(lora_alpha=inf\)"),
        ({"alpha_pattern": {"q_proj": 0}}, r"Config\(alpha_pattern\['q_proj'\]=0\) is not possible: .* above 0"),
        ({"alpha_pattern": {"q_proj": -1.5}}, r"Config\(alpha_pattern\['q_proj'\]=-1\.5\)"),
        ({"alpha_pattern": {"q_proj": "1"}}, r"Config\(alpha_pattern\['q_proj'\]='1'\)"),
    ],
    ids=str,
)
def test_settings_that_are_refused(settings, message):
    config = rw.SoraConfig(r=4)
    config.lora_alpha = None
    for name, value in settings.items():
        setattr(config, name, value)
    with pytest.raises(UserError, match=message):
        config.__post_init__()


@pytest.mark.parametrize(("name", "known"), [("gate_init", "normal or ones"), ("mode", "proximal or reference")])
def test_unknown_choices_are_refused(name, known):
    config = rw.SoraConfig(r=4)
    setattr(config, name, "other")
    with pytest.raises(UserError, match=f"{name}='other'\\) is unknown: {known}"):
        config.__post_init__()


def test_an_unknown_part_is_refused():
    config = rw.SoraConfig(r=4, part="minor")
    config.part = "minro"
    with pytest.raises(UserError, match=r"part 'minro' of the spectrum is unknown.*minor"):
        config.__post_init__()


def test_gates_of_a_model_without_any():
    plain = peft.get_peft_model(tiny.make("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match=r"adapter 'default' has no gates \(LoraConfig\): make it with rankwise"):
        gates(plain)
    with pytest.raises(UserError, match=r"not LlamaForCausalLM: use peft\.get_peft_model"):
        gates(tiny.make("llama"))


def test_a_real_model_starts_as_it_is(data_folder):
    base = tiny.real(data_folder)
    expected = tiny.logits(base)
    model = adapt(base, target_modules="all-linear", r=8)
    assert torch.equal(tiny.logits(model), expected)
    assert len(gates(model)) == 35


@pytest.mark.parametrize("init", ["normal", "ones"])
def test_a_part_of_the_spectrum_starts_as_the_base_with_any_gates(init):
    base = tiny.make("llama")
    expected = tiny.logits(base)
    model = adapt(base, part="minor", gate_init=init)
    assert all(layer.scaling["default"] == 1 for layer in tiny.layers(model).values())
    assert torch.equal(tiny.logits(model), expected)
    for gate in gates(model).values():
        gate.data.normal_()
    assert torch.equal(tiny.logits(model), expected)


def test_a_gated_direction_of_the_spectrum_is_its_change():
    """h = W x + s sum_i g_i (b_i a_i - b0_i a0_i) x; a closed gate gives the pretrained direction back."""
    model = tiny.train(adapt(tiny.make("llama"), part="principal", lora_alpha=6))
    layer = next(iter(tiny.layers(model).values()))
    gate = layer.lora_gate["default"]
    gate.data[1] = 0
    a, b, pair = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_start["default"]
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    change = sum(gate[i] * (torch.outer(b[:, i], a[i]) - torch.outer(pair.B[:, i], pair.A[i])) for i in range(4))
    assert change.abs().max() > 1e-3
    expected = x @ (layer.get_base_layer().weight + 1.5 * change).T
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_a_part_saves_and_loads_with_its_frozen_pair(tmp_path):
    model = tiny.train(adapt(tiny.make("llama"), part="minor"))
    for number, gate in enumerate(gates(model).values()):
        gate.data[:number] = 0
    rw.prune(model)
    expected = tiny.logits(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny.make("llama"), tmp_path)
    assert loaded.peft_config["default"].part == "minor"
    torch.testing.assert_close(tiny.logits(loaded), expected, atol=1e-6, rtol=1e-6)
