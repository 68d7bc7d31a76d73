"""What one layer computes, on every kind of module, against matrices that are multiplied here."""

from __future__ import annotations

import copy

import numpy as np
import peft
import pytest
import torch

import rankwise as rw
import tiny
from rankwise.errors import UserError
from rankwise.peft_bridge import matrix_factors
from tiny_modules import KINDS, adapt, make, matrix, train, with_weight


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "lora_alpha": 5}, {"part": "random"}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_computes_the_stated_update(kind, settings):
    """Start, training, disabling, merging and unmerging, against W + s (B A - B0 A0) in float64."""
    base, x = make(kind)
    expected, weight = base(x), base.only.weight.detach().clone()
    model, _ = adapt(kind, **settings)
    layer = model.get_base_model().only
    assert torch.equal(model(x), expected)
    assert torch.equal(model.train()(x), expected)
    train(model.eval(), x)
    (b, a), s = matrix_factors(layer, "default", "only"), layer.scaling["default"]
    update = s * (b.double() @ a.double()).numpy()
    pair = layer.lora_start["default"]
    b1, a1 = (
        (layer.lora_embedding_B["default"], layer.lora_embedding_A["default"])
        if kind == "embedding"
        else (layer.lora_B["default"].weight, layer.lora_A["default"].weight)
    )
    by_hand = b1.flatten(1).double() @ a1.flatten(1).double() - pair.B.flatten(1).double() @ pair.A.flatten(1).double()
    np.testing.assert_allclose(update, s * by_hand.detach().numpy(), atol=1e-6)
    assert np.abs(update).max() > 1e-2
    output = model(x).detach()
    np.testing.assert_allclose(output, with_weight(kind, update, x), atol=2e-5)
    assert torch.equal(layer.get_base_layer().weight, weight)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        np.testing.assert_allclose(
            matrix(layer.get_base_layer().weight, kind), matrix(weight, kind) + update, atol=1e-6
        )
        torch.testing.assert_close(model(x).detach(), output, atol=2e-5, rtol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(layer.get_base_layer().weight.detach(), weight, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("part", "chosen"), [("minor", slice(-3, None)), ("principal", slice(0, 3))])
def test_the_start_is_that_part_of_the_matrix(kind, part, chosen):
    model, _ = adapt(kind, part=part, lora_alpha=2)
    layer = model.get_base_model().only
    u, s, vh = np.linalg.svd(matrix(layer.get_base_layer().weight, kind), full_matrices=False)
    pair = layer.lora_start["default"]
    product = pair.B.flatten(1).double().numpy() @ pair.A.flatten(1).double().numpy()
    np.testing.assert_allclose(layer.scaling["default"] * product, (u[:, chosen] * s[chosen]) @ vh[chosen], atol=1e-5)


@pytest.mark.parametrize("part", [None, "minor"])
@pytest.mark.parametrize("kind", KINDS)
def test_gates_over_every_kind_of_module(kind, part):
    """SoRA: s B diag(g) A; with a part less its start; after pruning the same function at a smaller rank."""
    torch.manual_seed(1)
    model, x = adapt(kind, rw.SoraConfig, part=part)
    base, _ = make(kind)
    assert torch.equal(model(x), base(x))
    train(model, x)
    layer = model.get_base_model().only
    layer.lora_gate["default"].data[1] = 0
    (b, a), s = matrix_factors(layer, "default", "only"), layer.scaling["default"]
    assert a.shape[0] == (2 if part is None else 4)
    update = s * (b.double() @ a.double()).numpy()
    assert np.abs(update).max() > 1e-3
    output = model(x).detach()
    np.testing.assert_allclose(output, with_weight(kind, update, x), atol=2e-5)
    report = rw.prune(model)
    assert report.ranks == {"only": 2}
    torch.testing.assert_close(model(x).detach(), output, atol=2e-6, rtol=1e-5)
    assert report.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("config", [rw.MiloraConfig, rw.SoraConfig])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_mixed_adapters(kind, config):
    model, x = adapt(kind, config)
    train(model, x)
    model.add_adapter("second", config(r=2, target_modules=["only"]))
    model.set_adapter("second")
    train(model, x)
    second = model(x)[1]
    model.set_adapter("default")
    first = model(x)[0]
    mixed = model(x, adapter_names=["default", "second"])
    torch.testing.assert_close(mixed, torch.stack([first, second]), atol=1e-6, rtol=1e-6)
    base, _ = make(kind)
    mixed = model(x, adapter_names=["__base__", "second"])
    torch.testing.assert_close(mixed, torch.stack([base(x)[0], second]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("config", [rw.MiloraConfig, rw.SoraConfig])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sum_of_adapters(kind, config):
    """``cat`` is the weighted sum exactly; ``svd`` its best approximation, by numpy's SVD."""
    model, x = adapt(kind, config, lora_alpha=5)
    train(model, x)
    model.add_adapter("second", config(r=2, lora_alpha=1, target_modules=["only"]))
    model.set_adapter("second")
    train(model, x)
    layer = model.get_base_model().only

    def update(adapter: str) -> np.ndarray:
        return layer.scaling[adapter] * torch.matmul(*(f.double() for f in matrix_factors(layer, adapter, ""))).numpy()

    whole = 0.7 * update("default") - 1.5 * update("second")
    model.add_weighted_adapter(["default", "second"], [0.7, -1.5], "sum", combination_type="cat")
    model.add_weighted_adapter(["default", "second"], [0.7, -1.5], "best", svd_rank=2)
    np.testing.assert_allclose(update("sum"), whole, atol=1e-6)
    u, s, vh = np.linalg.svd(whole)
    np.testing.assert_allclose(update("best"), (u[:, :2] * s[:2]) @ vh[:2], atol=1e-5)
    assert type(layer.lora_variant["sum"]) is type(layer.lora_variant["default"])
    model.set_adapter("sum")
    np.testing.assert_allclose(model(x).detach(), with_weight(kind, whole, x), atol=2e-5)
    train(model, x, 1)
    assert np.abs(update("sum") - whole).max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["default"], [1.0], "new", "linear"), "combination_type 'linear' is not available: .* use cat"),
        ((["default", "default"], [1.0], "new"), "2 adapters and 1 weights"),
        ((["defualt"], [1.0], "new"), "adapter 'defualt' is unknown.*default"),
        ((["default"], [1.0], "default"), "adapter 'default' exists already"),
        ((["default"], [1.0], "new", "svd", 0), "svd_rank 0"),
    ],
    ids=str,
)
def test_sums_that_are_refused(arguments, message):
    model, _ = adapt("linear")
    with pytest.raises(UserError, match=message):
        model.add_weighted_adapter(*arguments)
    with pytest.raises(UserError, match=r"add_weighted_adapter\(density=0.5\) is not available"):
        model.add_weighted_adapter(["default"], [1.0], "new", density=0.5)
    assert list(model.peft_config) == ["default"]


def test_a_trained_layer_of_a_tiny_model_can_be_copied():
    model = tiny.train(peft.get_peft_model(tiny.make("llama"), rw.MiloraConfig(r=2, target_modules=["q_proj"])))
    assert torch.equal(tiny.logits(copy.deepcopy(model)), tiny.logits(model))


def test_what_a_sum_leaves_out_is_told():
    settings = {"modules_to_save": ["lm_head"], "trainable_token_indices": {"embed_tokens": [1, 5]}}
    model = tiny.train(tiny.milora(tiny.make("llama"), **settings))
    with pytest.warns(UserWarning) as told:
        model.add_weighted_adapter(["default", "default"], [0.5, 0.5], "sum", combination_type="cat")
    messages = [str(one.message) for one in told if "not summed" in str(one.message)]
    assert messages == [
        "modules_to_save of adapter 'default' (lm_head) are not summed: 'sum' has those of the base",
        "trainable_token_indices of adapter 'default' (embed_tokens) are not summed: 'sum' has those of the base",
    ]
    model.set_adapter("sum")
    base, found = tiny.make("llama"), model.get_base_model()
    assert torch.equal(found.lm_head.modules_to_save["sum"].weight, base.lm_head.weight)
    assert torch.equal(found.model.embed_tokens(tiny.IDS), base.model.embed_tokens(tiny.IDS))


def test_adapters_that_trained_one_whole_module_have_no_sum():
    settings = {"modules_to_save": ["lm_head"], "r": 2, "target_modules": ["q_proj"]}
    model = tiny.milora(tiny.make("llama"), **settings)
    model.add_adapter("second", rw.MiloraConfig(**settings))
    with pytest.raises(UserError, match=r"default, second have no sum: .*same module with modules_to_save"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    assert list(model.peft_config) == ["default", "second"]


def test_a_sum_of_matrices_alone_warns_of_nothing(recwarn):
    model = tiny.train(tiny.milora(tiny.make("llama")))
    model.add_weighted_adapter(["default"], [1.0], "sum", combination_type="cat")
    assert not [one for one in recwarn if "not summed" in str(one.message)]
