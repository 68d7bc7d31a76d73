"""What we rely on in PEFT's insides, and our one place that knows them. A failure here means: mend `peft_bridge/`."""

from __future__ import annotations

import inspect
import json

import peft
import peft.mapping
import pytest
import torch
from peft.tuners.lora import layer as peft_layer
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import rankwise as rw
import tiny
from rankwise.directions.dora import SpectralDoraVariant
from rankwise.directions.milora import MiloraModel
from rankwise.directions.variants import SpectralVariant
from rankwise.errors import UserError
from rankwise.peft_bridge import (
    Kind,
    LowRankVariant,
    active_adapter,
    adapted_layers,
    base_modules,
    check_config,
    matrix_factors,
    pattern_keys,
    target_modules,
)
from rankwise.peft_bridge.matrices import factor_matrices, factor_parameters
from rankwise.peft_bridge.tuner import VariantModel
from rankwise.ranks.sora.layer import GateVariant, SoraModel, SpectralGateVariant
from tiny_modules import KINDS, adapt


def names(function) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize(
    ("hook", "parameters"),
    [
        ("forward", ["module", "active_adapter", "x", "result", "kwargs"]),
        ("merge_safe", ["module", "active_adapter", "orig_weight"]),
        ("merge_unsafe", ["module", "active_adapter", "orig_weight"]),
        ("unmerge", ["module", "active_adapter", "orig_weight"]),
        ("supports_lora_conversion", []),
    ],
)
def test_hooks_of_a_variant(hook, parameters):
    """PEFT calls each by these names, and ours answer to them; no hook is PEFT's own any more."""
    assert names(getattr(peft_layer.LoraVariant, hook)) == parameters
    for ours in (SpectralVariant, GateVariant, SpectralDoraVariant, SpectralGateVariant):
        assert names(getattr(ours, hook)) == parameters
        assert getattr(ours, hook) is not getattr(peft_layer.LoraVariant, hook)


def test_no_hook_was_added_that_we_do_not_know():
    public = {name for name in vars(peft_layer.LoraVariant) if not name.startswith("_")}
    assert public == {"init", "merge_safe", "merge_unsafe", "unmerge", "forward", "supports_lora_conversion"}


def test_the_tuner_makes_layers_where_we_expect_it():
    expected = ["lora_config", "adapter_name", "target", "target_name", "parent", "current_key", "parameter_name"]
    assert names(LoraModel._create_and_replace) == expected
    assert names(VariantModel._create_and_replace)[:6] == expected[:6]
    assert inspect.isfunction(LoraModel.add_weighted_adapter)
    assert VariantModel.add_weighted_adapter is not LoraModel.add_weighted_adapter


def test_mappings_know_our_methods():
    for name, config, tuner in (("MILORA", rw.MiloraConfig, MiloraModel), ("SORA", rw.SoraConfig, SoraModel)):
        assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[name] is config
        assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[name] is tuner
        assert peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[name] == LoraModel.prefix == "lora_"
        assert config().peft_type == name and hash(config().peft_type) == hash(name)
        assert config().peft_type is Kind(name) and json.loads(json.dumps(config().to_dict()))["peft_type"] == name
        assert name not in {each.value for each in peft.PeftType}


@pytest.mark.parametrize("config", [rw.MiloraConfig, rw.SoraConfig])
def test_peft_reads_the_kind_as_its_own(tmp_path, config):
    """In a status, in a message, and back from what was saved."""
    settings = {"r": 2, "target_modules": ["q_proj"]}
    model = peft.get_peft_model(tiny.make("llama"), config(**settings))
    assert peft.get_model_status(model).peft_types == {"default": config().peft_type.value}
    with pytest.raises(ValueError, match=f"'{config().peft_type.value}' is not compatible with the `PeftMixedModel`"):
        peft.get_peft_model(tiny.make("llama"), config(**settings), mixed=True)
    again = peft.PeftConfig.from_peft_type(**config(**settings).to_dict())
    assert type(again) is config and again.peft_type is config().peft_type and again == config(**settings)


def test_the_place_of_an_adapter_s_own_parameters():
    for kind in KINDS:
        layer = adapt(kind)[0].get_base_model().only
        a, b = factor_parameters(layer, "default")
        views = factor_matrices(layer, "default")
        assert [name for name, value in layer.named_parameters() if value is a or value is b] == (
            ["lora_embedding_A.default", "lora_embedding_B.default"]
            if kind == "embedding"
            else ["lora_A.default.weight", "lora_B.default.weight"]
        )
        assert torch.equal(views[0], b.flatten(1)) and torch.equal(views[1], a.flatten(1))


def test_layers_have_what_we_read():
    layer = peft_layer.Linear(nn.Linear(4, 6), "default", config=peft.LoraConfig(), r=2, lora_alpha=4)
    assert layer.lora_variant == {} and layer.r == {"default": 2} and layer.scaling == {"default": 2.0}
    assert layer.lora_alpha == {"default": 4} and layer.lora_bias == {"default": False}
    assert layer.lora_A["default"].weight.shape == (2, 4) and layer.lora_B["default"].weight.shape == (6, 2)
    assert layer.fan_in_fan_out is False and isinstance(layer.get_base_layer(), nn.Linear)
    assert isinstance(layer.lora_dropout["default"], nn.Identity)
    assert len(layer.lora_embedding_A) == len(layer.lora_embedding_B) == 0
    assert layer.adapter_layer_names == peft_layer.LoraLayer.adapter_layer_names
    assert {"lora_A", "lora_B"} <= set(layer.adapter_layer_names)


def test_a_layer_that_loses_its_active_adapter_activates_another():
    """The habit that pruning undoes; where PEFT drops it, pruning's guard can go."""
    model = peft.get_peft_model(tiny.make("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    model.add_adapter("second", peft.LoraConfig(target_modules=["q_proj"]))
    layer = next(iter(tiny.layers(model).values()))
    assert "set_adapter" in dir(BaseTunerLayer)
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        layer.delete_adapter("default")
    assert layer.active_adapters == ["second"]


@pytest.mark.parametrize("config", [rw.MiloraConfig, rw.SoraConfig])
def test_a_layer_keeps_our_state_with_its_adapter(config):
    """State is listed in the layer's own names, not in those of PEFT's class, once for any number of adapters."""
    model = peft.get_peft_model(tiny.make("llama"), config(r=2, target_modules=["q_proj"]))
    model.add_adapter("second", config(r=2, target_modules=["q_proj"]))
    state = "lora_start" if config is rw.MiloraConfig else "lora_gate"
    for layer in tiny.layers(model).values():
        assert layer.adapter_layer_names.count(state) == 1
        assert set(getattr(layer, state).keys()) == set(layer.lora_variant) == {"default", "second"}
        assert all(isinstance(variant, LowRankVariant) for variant in layer.lora_variant.values())
    assert state not in peft_layer.LoraLayer.adapter_layer_names
    model.delete_adapter("second")
    for layer in tiny.layers(model).values():
        assert set(getattr(layer, state).keys()) == set(layer.lora_variant) == {"default"}


def test_the_settings_of_other_variants_are_found():
    fields = {f.name for f in rw.MiloraConfig.__dataclass_fields__.values() if f.metadata.get("is_lora_variant")}
    assert {"use_dora", "kasa_config", "arrow_config", "alora_invocation_tokens"} <= fields
    check_config(peft.LoraConfig(init_lora_weights="gaussian"))
    for start in ("pissa", "olora", "orthogonal"):
        with pytest.raises(UserError, match=rf"LoraConfig\(init_lora_weights='{start}'\) is not available"):
            check_config(peft.LoraConfig(init_lora_weights=start))
    with pytest.raises(UserError, match=r"LoraConfig\(use_dora=True\) is not available: leave use_dora out"):
        check_config(peft.LoraConfig(use_dora=True))


def test_active_adapter():
    model = peft.get_peft_model(tiny.make("llama"), rw.SoraConfig(target_modules=["q_proj"]), adapter_name="first")
    assert active_adapter(model) == "first"
    model.add_adapter("second", rw.SoraConfig(target_modules=["v_proj"]))
    assert [name for name, _ in adapted_layers(model, "second")] == [
        f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)
    ]
    model.base_model.set_adapter(["first", "second"])
    with pytest.raises(UserError, match=r"one active adapter is needed, not 2 \(first, second\)"):
        active_adapter(model)
    with pytest.raises(UserError, match=r"not Linear: use peft\.get_peft_model first"):
        active_adapter(nn.Linear(2, 2))


@pytest.mark.parametrize("family", list(tiny.TARGETS))
@pytest.mark.parametrize("config", [peft.LoraConfig, rw.MiloraConfig, rw.SoraConfig])
def test_factors_multiply_to_the_update(family, config):
    """Against the update as the layer itself computes it on the unit vectors."""
    torch.manual_seed(1)
    settings = {"r": 3, "lora_alpha": 7, "target_modules": tiny.TARGETS[family], "fan_in_fan_out": family == "gpt2"}
    model = tiny.train(peft.get_peft_model(tiny.make(family), config(**settings)))
    for name, dense in tiny.dense_updates(model).items():
        layer = tiny.layers(model)[name]
        b, a = matrix_factors(layer, "default", name)
        assert dense.abs().max() > 1e-3
        torch.testing.assert_close(layer.scaling["default"] * b.double() @ a.double(), dense, atol=2e-6, rtol=1e-4)


class Mixed(nn.Module):
    """Modules without a matrix, and names of which one ends in another."""

    def __init__(self) -> None:
        super().__init__()
        self.picture = nn.Conv2d(1, 4, 2)
        self.attention = nn.MultiheadAttention(4, 2)
        self.fc = nn.Linear(4, 4)
        self.block = nn.ModuleDict({"fc": nn.Linear(4, 4), "fd": nn.Linear(4, 4)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["attention"]}, "attention: an adapter of MultiheadAttention"),
        ({"target_modules": ["fc"], "lora_bias": True}, "fc: an adapter with lora_bias"),
        ({"target_modules": ["fc"], "use_dora": True}, "fc: an update of DoraLinearVariant"),
        ({"target_parameters": ["block.fd.weight"], "target_modules": []}, "an adapter of ParamWrapper"),
    ],
    ids=str,
)
def test_an_adapter_without_two_small_matrices_is_refused(settings, message):
    model = peft.get_peft_model(Mixed(), peft.LoraConfig(r=2, **settings))
    with pytest.raises(UserError, match=message):
        for name, layer in adapted_layers(model, "default"):
            matrix_factors(layer, "default", name)


def test_names_mean_just_their_modules():
    model = peft.get_peft_model(Mixed(), peft.LoraConfig(r=2, target_modules=["fc", "fd"]))
    plain = [name for name, _ in Mixed().named_modules()]
    assert [name for name, _ in base_modules(model)] == plain == [name for name, _ in base_modules(Mixed())]
    assert target_modules(model, ["block.fc", "block.fd"]) == {"block.fc", "block.fd"}
    assert target_modules(model, ["fc", "block.fc"]) == {"fc", "block.fc"}
    assert pattern_keys(model, ["fc", "block.fd"]) == {"fc": "^fc", "block.fd": "block.fd"}
    for chosen in (["fc"], ["block.fc"], ["fc", "block.fd"], ["fc", "block.fc", "block.fd"]):
        keys = pattern_keys(model, chosen)
        pattern = {keys[name]: rank for rank, name in enumerate(chosen, start=2)}
        config = peft.LoraConfig(r=1, target_modules=target_modules(model, chosen), rank_pattern=pattern)
        found = {name: layer.r["default"] for name, layer in tiny.layers(peft.get_peft_model(Mixed(), config)).items()}
        assert found == {name: rank for rank, name in enumerate(chosen, start=2)}
