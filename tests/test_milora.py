from __future__ import annotations

import copy

import numpy as np
import peft
import pytest
import torch
from torch import nn

import rankwise as rw
import tiny
from rankwise.errors import UserError

FAMILIES = list(tiny.TARGETS)
PARTS = ["minor", "principal", "middle", "random"]


def adapt(base: nn.Module, family: str = "llama", **settings) -> peft.PeftModel:
    return peft.get_peft_model(base, rw.MiloraConfig(**{"r": 4, "target_modules": tiny.TARGETS[family]} | settings))


def matrix(layer: nn.Module) -> np.ndarray:
    """The base weight as (out, in) in float64."""
    weight = layer.get_base_layer().weight.detach().double().numpy()
    return weight.T if layer.fan_in_fan_out else weight


def start_of(layer: nn.Module, adapter: str = "default") -> np.ndarray:
    """s B0 A0 of a layer."""
    pair = layer.lora_start[adapter]
    return layer.scaling[adapter] * (pair.B.double() @ pair.A.double()).numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_starts_as_the_base_and_never_changes_it(family, dtype):
    """Outputs differ from the base's by exactly 0.0 at step 0; weights stay the same to the bit throughout."""
    base = tiny.make(family, dtype)
    weights, expected = tiny.base_weights(base), tiny.logits(base)
    model = adapt(base, family)
    assert torch.equal(tiny.logits(model), expected)
    tiny.train(model)
    assert not torch.equal(tiny.logits(model), expected)
    after = tiny.base_weights(model)
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), expected)


@pytest.mark.parametrize("part", PARTS)
def test_starts_as_a_real_model(data_folder, part):
    base = tiny.real(data_folder)
    expected = tiny.logits(base)
    model = adapt(base, target_modules="all-linear", part=part)
    assert len(tiny.layers(model)) == 35
    assert torch.equal(tiny.logits(model), expected)
    tiny.train(model, steps=1)
    assert not torch.equal(tiny.logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), expected)


def test_dropout_and_autocast_leave_the_start_exact():
    base = tiny.make("llama")
    model = adapt(base, lora_dropout=0.5).train()
    with model.disable_adapter():
        expected = tiny.logits(model)
    assert torch.equal(tiny.logits(model), expected)
    with torch.autocast("cpu", torch.bfloat16):
        with model.disable_adapter():
            expected = tiny.logits(model)
        assert torch.equal(tiny.logits(model), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("part", "chosen"), [("minor", slice(-4, None)), ("principal", slice(0, 4))])
def test_the_initial_pair_is_that_part_of_the_weight(family, part, chosen):
    """s B0 A0 is the sum of s_i u_i v_i over the part; B0 and A0 share the singular values evenly."""
    model = adapt(tiny.make(family), family, part=part, lora_alpha=6)
    for layer in tiny.layers(model).values():
        u, s, vh = np.linalg.svd(matrix(layer), full_matrices=False)
        expected = (u[:, chosen] * s[chosen]) @ vh[chosen]
        np.testing.assert_allclose(start_of(layer), expected, atol=1e-5 * s[0])
        pair = layer.lora_start["default"]
        np.testing.assert_allclose(pair.B.norm(dim=0), pair.A.norm(dim=1), rtol=1e-5)
        assert torch.equal(pair.A, layer.lora_A["default"].weight)
        assert torch.equal(pair.B, layer.lora_B["default"].weight)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"part": "principal"}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_trains_as_the_paper_writes_it(family, settings):
    """Against plain LoRA started at B0, A0 on W - s B0 A0: the same gradients, weights and outputs, in float64."""
    ours = adapt(tiny.make(family, torch.float64), family, lora_alpha=6, **settings)
    plain = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=tiny.TARGETS[family],
        use_rslora=settings.get("use_rslora", False),
        fan_in_fan_out=family == "gpt2",
    )
    paper = peft.get_peft_model(tiny.make(family, torch.float64), plain)
    for name, layer in tiny.layers(paper).items():
        mine = tiny.layers(ours)[name]
        layer.lora_A["default"].weight.data.copy_(mine.lora_A["default"].weight)
        layer.lora_B["default"].weight.data.copy_(mine.lora_B["default"].weight)
        start = torch.tensor(start_of(mine))
        layer.get_base_layer().weight.data -= start.T if layer.fan_in_fan_out else start
    torch.testing.assert_close(tiny.logits(ours), tiny.logits(paper), atol=1e-10, rtol=1e-10)

    tiny.loss(ours).backward()
    tiny.loss(paper).backward()
    for name, layer in tiny.layers(paper).items():
        for factor in ("lora_A", "lora_B"):
            gradient = getattr(layer, factor)["default"].weight.grad
            assert gradient.abs().max() > 1e-6
            mine = getattr(tiny.layers(ours)[name], factor)["default"].weight.grad
            torch.testing.assert_close(mine, gradient, atol=1e-12, rtol=1e-8)

    for model in (ours, paper):
        model.zero_grad()
        tiny.train(model, 5, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2))
    before = tiny.logits(adapt(tiny.make(family, torch.float64), family))
    assert (tiny.logits(ours) - before).abs().max() > 1e-2
    torch.testing.assert_close(tiny.logits(ours), tiny.logits(paper), atol=1e-8, rtol=1e-8)


def test_only_the_two_factors_are_trained():
    model = adapt(tiny.make("llama"))
    trained = {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"}
    pair = copy.deepcopy(tiny.layers(model)["model.layers.0.self_attn.q_proj"].lora_start["default"])
    tiny.train(model)
    after = tiny.layers(model)["model.layers.0.self_attn.q_proj"].lora_start["default"]
    assert torch.equal(after.A, pair.A) and torch.equal(after.B, pair.B)


def test_alpha_is_the_rank_where_it_is_not_given():
    assert rw.MiloraConfig(r=32).lora_alpha == 32
    assert rw.MiloraConfig(r=32, lora_alpha=16).lora_alpha == 16
    assert set(tiny.layers(adapt(tiny.make("llama"), r=3))["model.layers.0.mlp.down_proj"].scaling.values()) == {1.0}


def test_rank_and_alpha_patterns_and_rslora():
    model = adapt(
        tiny.make("llama"),
        use_rslora=True,
        rank_pattern={"down_proj": 7, "layers.1.self_attn.q_proj": 2},
        alpha_pattern={"v_proj": 5},
    )
    found = tiny.layers(model)
    assert found["model.layers.0.mlp.down_proj"].r["default"] == 7
    assert found["model.layers.1.self_attn.q_proj"].r["default"] == 2
    assert found["model.layers.0.self_attn.v_proj"].scaling["default"] == 5 / 2
    for layer in found.values():
        u, s, vh = np.linalg.svd(matrix(layer), full_matrices=False)
        r = layer.r["default"]
        np.testing.assert_allclose(start_of(layer), (u[:, -r:] * s[-r:]) @ vh[-r:], atol=1e-5 * s[0])
    assert torch.equal(tiny.logits(model), tiny.logits(tiny.make("llama")))


def test_two_adapters_share_one_base():
    base = tiny.make("llama")
    expected = tiny.logits(base)
    model = tiny.train(adapt(base))
    first = tiny.logits(model)
    second = rw.MiloraConfig(r=3, part="principal", target_modules=["q_proj", "up_proj"])
    model.add_adapter("second", second)
    assert torch.equal(tiny.logits(model), first)
    model.set_adapter("second")
    assert torch.equal(tiny.logits(model), expected)
    tiny.train(model)
    assert not torch.equal(tiny.logits(model), expected)
    model.set_adapter("default")
    assert torch.equal(tiny.logits(model), first)
    mixed = tiny.logits_of_rows(model.eval(), ["default", "__base__"])
    torch.testing.assert_close(mixed, torch.stack([first[0], expected[1]]), atol=1e-5, rtol=1e-5)
    model.delete_adapter("default")
    assert all("default" not in getattr(layer, "lora_start", {}) for layer in tiny.layers(model).values())


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_merges_and_unmerges(family, safe):
    base = tiny.make(family)
    weights = tiny.base_weights(base)
    model = tiny.train(adapt(base, family))
    expected = tiny.logits(model)
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(tiny.logits(model), expected, atol=1e-5, rtol=1e-5)
    changed = [name for name, value in tiny.base_weights(model).items() if not torch.equal(value, weights[name])]
    assert len(changed) == len(tiny.layers(model))
    model.unmerge_adapter()
    for name, value in tiny.base_weights(model).items():
        torch.testing.assert_close(value, weights[name], atol=1e-6, rtol=1e-6)
    merged = model.merge_and_unload()
    torch.testing.assert_close(tiny.logits(merged), expected, atol=1e-5, rtol=1e-5)
    assert not tiny.layers(merged)


def test_a_bfloat16_base_is_adapted_in_float32():
    model = tiny.train(adapt(tiny.make("llama", torch.bfloat16)))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert tiny.logits(model).dtype == torch.bfloat16


def test_the_dtype_of_a_bfloat16_base_where_it_is_asked_for():
    base = tiny.make("llama", torch.bfloat16)
    expected = tiny.logits(base)
    config = rw.MiloraConfig(r=4, target_modules=tiny.TARGETS["llama"])
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    assert torch.equal(tiny.logits(model), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_bias": True}, "lora_bias=True"),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "gaussian"}, "init_lora_weights='gaussian'"),
        ({"lora_alpha": 0}, "lora_alpha=0"),
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
        ({"target_parameters": ["q_proj.weight"]}, "target_parameters="),
    ],
    ids=str,
)
def test_settings_that_are_refused(settings, message):
    config = rw.MiloraConfig(r=4)
    config.lora_alpha = None
    for name, value in settings.items():
        setattr(config, name, value)
    with pytest.raises(UserError, match=message):
        config.__post_init__()


def test_a_rank_above_the_smaller_side_is_refused():
    with pytest.raises(UserError, match=r"rank 9 of a weight of shape \(8, 16\)"):
        adapt(tiny.make("llama"), r=9, target_modules=["v_proj"])


def test_no_conversion_of_peft_takes_b_a_for_the_update():
    assert not any(
        layer.supports_lora_conversion("default") for layer in tiny.layers(adapt(tiny.make("llama"))).values()
    )
