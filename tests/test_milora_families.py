"""MiLoRA on every family of models: where it starts, what training changes, and that the base stays as it was."""

from __future__ import annotations

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import layer as kinds

import rankwise as rw
import tiny
import tiny_families
from tiny_families import FAMILIES

NAMES = list(FAMILIES)


def adapt(name: str, config: type[peft.LoraConfig] = rw.MiloraConfig, **settings) -> peft.PeftModel:
    base = tiny_families.make(name)
    settings = {"r": 2, "target_modules": tiny_families.targets(name, base)} | settings
    return peft.get_peft_model(base, config(**settings)).eval()


@pytest.mark.parametrize("name", NAMES)
def test_all_linear_and_what_lies_beside(name):
    """Exact start; the base's weights and, with the adapter disabled, its logits to the bit; merged as unmerged."""
    base = tiny_families.make(name)
    weights, expected = tiny.base_weights(base), tiny_families.logits(base, name)
    model = adapt(name)
    found = tiny.layers(model)
    beside = [each for each in found if each.endswith(FAMILIES[name].beside)]
    assert beside and len(found) - len(beside) >= 8
    assert any(isinstance(found[each], kinds.Embedding | kinds.Conv1d | kinds.Conv2d) for each in beside)
    assert torch.equal(tiny_families.logits(model, name), expected)

    tiny_families.train(model, name)
    trained = tiny_families.logits(model, name)
    assert (trained - expected).abs().max() > 1e-3
    assert all(torch.equal(value, weights[key]) for key, value in tiny.base_weights(model).items())
    # A layer that this loss does not reach need not move; most must.
    moved = [layer.lora_variant["default"].delta(layer, "default").abs().max() > 0 for layer in found.values()]
    assert sum(moved) >= 0.9 * len(moved)
    with model.disable_adapter():
        assert torch.equal(tiny_families.logits(model, name), expected)

    model.merge_adapter()
    torch.testing.assert_close(tiny_families.logits(model, name), trained, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(tiny_families.logits(model, name), trained, atol=1e-4, rtol=1e-4)
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(tiny_families.logits(merged, name), trained, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_words_all_linear(name):
    """PEFT's own choice of modules is the one that the tests make."""
    model = peft.get_peft_model(tiny_families.make(name), rw.MiloraConfig(r=2, target_modules="all-linear"))
    own = tiny_families.targets(name, tiny_families.make(name))
    assert set(tiny.layers(model)) == {each for each in own if not each.endswith(FAMILIES[name].beside)}


@pytest.mark.parametrize("name", ["llama", "gpt2", "deberta-v3", "vit"])
def test_a_bfloat16_base_starts_as_it_is(name):
    base = tiny_families.make(name, torch.bfloat16)
    expected = tiny_families.logits(base, name, torch.bfloat16)
    config = rw.MiloraConfig(r=2, target_modules=tiny_families.targets(name, base))
    model = peft.get_peft_model(base, config)
    assert torch.equal(tiny_families.logits(model, name, torch.bfloat16), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert", "deberta-v2", "vit"])
def test_gates_over_spectral_directions(name):
    """SoRA with a part: the base's function at the start with any gates, and again where all are closed."""
    base = tiny_families.make(name)
    expected = tiny_families.logits(base, name)
    torch.manual_seed(1)
    model = adapt(name, rw.SoraConfig, part="minor")
    assert model.peft_config["default"].lora_alpha == 2
    assert torch.equal(tiny_families.logits(model, name), expected)
    tiny_families.train(model, name)
    trained = tiny_families.logits(model, name)
    assert (trained - expected).abs().max() > 1e-3
    for number, layer in enumerate(tiny.layers(model).values()):
        layer.lora_gate["default"].data[number % 2] = 0
    closed = tiny_families.logits(model, name)
    assert not torch.equal(closed, trained)
    rw.prune(model)
    torch.testing.assert_close(tiny_families.logits(model, name), closed, atol=1e-5, rtol=1e-5)
    for layer in tiny.layers(model).values():
        layer.lora_gate["default"].data.zero_()
    assert torch.equal(tiny_families.logits(model, name), expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=str)
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, dropout, settings):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(2)
        targets = ["q_proj", "v_proj", "down_proj"]
        model = adapt("llama", lora_dropout=dropout, target_modules=targets, **settings).train()
        for layer in tiny.layers(model).values():  # away from the start, where much is zero
            layer.lora_B["default"].weight.data *= 1.5
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(3)
        model(**tiny_families.inputs("llama")).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert len(gradients[0]) == (18 if settings else 12)
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_modules_to_save_are_trained_beside(name):
    head = {"llama": "lm_head", "bert": "classifier"}[name]
    model = adapt(name, modules_to_save=[head])
    assert torch.equal(tiny_families.logits(model, name), tiny_families.logits(tiny_families.make(name), name))
    trained = {each for each, p in model.named_parameters() if p.requires_grad and ".lora_" not in each}
    assert trained and all(f"{head}.modules_to_save" in each for each in trained)
    tiny_families.train(model, name)
    with model.disable_adapter():
        assert torch.equal(tiny_families.logits(model, name), tiny_families.logits(tiny_families.make(name), name))


def test_lora_plus_learns_b_faster():
    """PEFT's LoRA+ optimizer: B at 16 times A's rate, which shows in the first step of Adam; start and base stay."""
    model = adapt("llama", target_modules=["q_proj", "v_proj"])
    optimizer = create_loraplus_optimizer(
        model, torch.optim.Adam, lr=1e-4, loraplus_lr_ratio=16, loraplus_weight_decay=0.0
    )
    weights = tiny.base_weights(model)
    tiny.train(model, 1, optimizer)
    for layer in tiny.layers(model).values():
        pair = layer.lora_start["default"]
        moved_a = (layer.lora_A["default"].weight - pair.A).abs().max()
        moved_b = (layer.lora_B["default"].weight - pair.B).abs().max()
        torch.testing.assert_close(moved_b / moved_a, torch.tensor(16.0), atol=0.1, rtol=0)
    assert all(torch.equal(value, weights[key]) for key, value in tiny.base_weights(model).items())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_fifty_steps_as_the_paper_takes_them(name):
    """Against plain LoRA of PEFT started at A0, B0 on W - s B0 A0, in float32 with SGD, step by step.

    The two differ by rounding alone: W is rounded once in W - s B0 A0, by half a unit in the last place (6e-8 of its
    values of about 0.2), and each product by a few. Fifty steps of SGD carry that on without making it large: losses
    agree to 1e-5, the trained factors to 1e-4 of what they moved by, on average.
    """
    targets = ["q_proj", "v_proj", "down_proj"] if name == "llama" else ["c_attn", "c_fc"]
    ours = adapt(name, target_modules=targets, r=4)
    plain = peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets, fan_in_fan_out=name == "gpt2")
    paper = peft.get_peft_model(tiny_families.make(name), plain).eval()
    starts = {}
    for key, layer in tiny.layers(paper).items():
        pair = tiny.layers(ours)[key].lora_start["default"]
        starts[key] = pair.A.clone(), pair.B.clone()
        layer.lora_A["default"].weight.data.copy_(pair.A)
        layer.lora_B["default"].weight.data.copy_(pair.B)
        product = pair.B @ pair.A
        layer.get_base_layer().weight.data -= product.T if name == "gpt2" else product
    losses: list[list[float]] = [[], []]
    for model, found in zip((ours, paper), losses, strict=True):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(50):
            loss = model(**tiny_families.inputs(name)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
    assert losses[0][-1] < losses[0][0] - 0.1
    assert max(abs(one - other) for one, other in zip(*losses, strict=True)) < 1e-5 * losses[0][0]
    for key, layer in tiny.layers(paper).items():
        mine = tiny.layers(ours)[key]
        for factor, start in (("lora_A", starts[key][0]), ("lora_B", starts[key][1])):
            expected = getattr(layer, factor)["default"].weight.detach()
            far = (getattr(mine, factor)["default"].weight.detach() - expected).norm()
            assert far < 1e-4 * (expected - start).norm()
