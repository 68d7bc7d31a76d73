"""MiLoRA with DoRA's magnitude, against PEFT's own DoRA of twice the rank."""

from __future__ import annotations

import peft
import pytest
import torch

import rankwise as rw
from rankwise.directions.dora import SpectralDoraVariant
from rankwise.errors import UserError
from tiny_modules import adapt, make, train


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["linear", "conv1d_of_gpt2"])
def test_dora_is_peft_s_own_of_twice_the_rank(kind, dropout):
    """Against PEFT's DoRA with [A; A0], [B, -B0] and the same magnitude: outputs and gradients."""
    model, x = adapt(kind, use_dora=True, lora_dropout=dropout)
    base, _ = make(kind)
    assert torch.equal(model(x), base(x))
    assert torch.equal(model.train()(x), base(x))
    train(model, x)
    layer = model.get_base_model().only
    assert isinstance(layer.lora_variant["default"], SpectralDoraVariant)
    plain = peft.LoraConfig(r=6, lora_alpha=6, target_modules=["only"], use_dora=True, lora_dropout=dropout)
    other = peft.get_peft_model(make(kind)[0], plain)
    twin, pair = other.get_base_model().only, layer.lora_start["default"]
    twin.lora_A["default"].weight.data = torch.cat([layer.lora_A["default"].weight, pair.A]).detach()
    twin.lora_B["default"].weight.data = torch.cat([layer.lora_B["default"].weight, -pair.B], dim=1).detach()
    magnitude = layer.lora_magnitude_vector["default"].weight
    twin.lora_magnitude_vector["default"].weight.data = magnitude.detach().clone()
    outputs = []
    for each in (model, other):
        torch.manual_seed(2)
        outputs.append(each.train()(x))
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(magnitude.grad, twin.lora_magnitude_vector["default"].weight.grad, atol=1e-4, rtol=1e-4)
    for name, shared in (("lora_A", slice(0, 3)), ("lora_B", (slice(None), slice(0, 3)))):
        gradient = getattr(twin, name)["default"].weight.grad[shared]
        torch.testing.assert_close(getattr(layer, name)["default"].weight.grad, gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv1d_of_gpt2"])
def test_dora_merges_and_unmerges(kind, safe):
    model, x = adapt(kind, use_dora=True)
    weight = model.get_base_model().only.get_base_layer().weight.detach().clone()
    train(model, x, 10)
    model.add_adapter("second", rw.MiloraConfig(r=2, use_dora=True, target_modules=["only"]))
    expected = model(x).detach()
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(model(x).detach(), expected, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model.get_base_model().only.get_base_layer().weight.detach(), weight)
    torch.testing.assert_close(model(x).detach(), expected, atol=1e-5, rtol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), expected, atol=1e-5, rtol=1e-5)


def test_dora_of_a_row_of_zeros_starts_as_the_base():
    base, x = make("linear")
    base.only.weight.data[2] = 0
    expected = base(x)
    model = peft.get_peft_model(base, rw.MiloraConfig(r=3, use_dora=True, target_modules=["only"]))
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("kind", ["embedding", "conv1d", "conv2d", "conv3d"])
def test_dora_of_other_modules_is_refused(kind):
    with pytest.raises(UserError, match=r"cannot adapt only .*use_dora is for Linear and Conv1D"):
        adapt(kind, use_dora=True)


def test_dora_has_no_sum_and_no_factors():
    model, _ = adapt("linear", use_dora=True)
    with pytest.raises(UserError, match="only: an update of SpectralDoraVariant is no product"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("second", [True, False], ids=["dora and dora", "dora and milora"])
@pytest.mark.parametrize("first", [True, False], ids=["dora first", "milora first"])
@pytest.mark.parametrize("kind", ["linear", "conv1d_of_gpt2"])
def test_two_trained_adapters_merge_and_unmerge(kind, first, second, safe):
    """Both active: each norm is that of the base and its own update, whatever was merged before."""
    model, x = adapt(kind, use_dora=first)
    layer, before = model.get_base_model().only, model(x).detach()
    weight = layer.get_base_layer().weight.detach().clone()
    train(model, x, 10)
    model.add_adapter("second", rw.MiloraConfig(r=2, use_dora=second, target_modules=["only"], fan_in_fan_out=False))
    model.set_adapter("second")
    train(model, x, 10)
    model.base_model.set_adapter(["default", "second"])
    expected = model.eval()(x).detach()
    assert (expected - before).abs().max() > 0.1
    model.merge_adapter(safe_merge=safe)
    assert layer.merged_adapters == ["default", "second"]
    torch.testing.assert_close(model(x).detach(), expected, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(layer.get_base_layer().weight.detach(), weight, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(model(x).detach(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.merge_and_unload(safe_merge=safe)(x), expected, atol=1e-5, rtol=1e-5)
