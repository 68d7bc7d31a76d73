from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

import rankwise as rw
import tiny
from rankwise.errors import UserError
from rankwise.ranks import gates

# How many of each layer's four gates are made zero, in the order of the layers; the second layer dies.
DEAD = (1, 4, 0, 2, 3, 0)


def trained(family: str = "llama", dead: tuple[int, ...] = DEAD, **settings) -> peft.PeftModel:
    config = {"r": 4, "lora_alpha": 6, "target_modules": tiny.TARGETS[family]} | settings
    torch.manual_seed(1)
    model = tiny.train(peft.get_peft_model(tiny.make(family), rw.SoraConfig(**config)))
    kill(model, dead)
    return model


def kill(model: peft.PeftModel, dead: tuple[int, ...]) -> None:
    """Set the last gates of each layer to zero, and one in the middle first."""
    for number, gate in zip(dead, gates(model).values(), strict=False):
        order = [2, 3, 0, 1]
        gate.data[order[:number]] = 0


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", list(tiny.TARGETS))
def test_the_function_stays_the_same(tmp_path, family, rslora):
    """Before, after, and after saving and loading; every scaling is as it was."""
    model = trained(family, use_rslora=rslora)
    expected = tiny.logits(model)
    scalings = {name: layer.scaling["default"] for name, layer in tiny.layers(model).items()}
    assert not torch.equal(expected, tiny.logits(tiny.make(family)))
    report = rw.prune(model)
    torch.testing.assert_close(tiny.logits(model), expected, atol=1e-6, rtol=1e-6)
    assert report.removed
    for name, layer in tiny.layers(model).items():
        assert layer.scaling["default"] == scalings[name]
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny.make(family), tmp_path)
    assert list(tiny.layers(loaded)) == list(tiny.layers(model))
    torch.testing.assert_close(tiny.logits(loaded), expected, atol=1e-6, rtol=1e-6)
    for name, layer in tiny.layers(loaded).items():
        assert layer.scaling["default"] == pytest.approx(scalings[name], rel=1e-12)


def test_ranks_parameters_and_removed_layers():
    """A direction of q_proj costs 16 + 16 + 1 numbers, of v_proj 16 + 8 + 1, of down_proj 24 + 16 + 1."""
    model = trained()
    names = list(gates(model))
    assert [name.split(".")[-1] for name in names] == ["q_proj", "v_proj", "down_proj"] * 2
    report = rw.prune(model)
    assert report.ranks == dict(zip(names, (3, 0, 4, 2, 1, 4), strict=True))
    assert report.removed == (names[1],)
    assert report.parameters_before == 2 * 4 * (33 + 25 + 41)
    assert report.parameters == 3 * 33 + 4 * 41 + 2 * 33 + 1 * 25 + 4 * 41
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == report.parameters
    assert type(model.get_base_model().get_submodule(names[1])) is nn.Linear
    layer = tiny.layers(model)[names[0]]
    assert layer.lora_A["default"].weight.shape == (3, 16) and layer.lora_A["default"].out_features == 3
    assert layer.lora_B["default"].weight.shape == (16, 3) and layer.lora_B["default"].in_features == 3
    assert layer.r["default"] == gates(model)[names[0]].numel() == 3


def test_without_a_dead_gate_nothing_is_cut():
    model = trained(dead=(0,) * 6)
    expected = tiny.logits(model)
    report = rw.prune(model)
    assert not report.removed and report.parameters == report.parameters_before
    assert torch.equal(tiny.logits(model), expected)


def test_pruning_twice_is_pruning_once():
    model = trained()
    first = rw.prune(model)
    expected = tiny.logits(model)
    second = rw.prune(model)
    assert second.parameters == second.parameters_before == first.parameters
    assert {name: rank for name, rank in first.ranks.items() if rank} == second.ranks
    assert torch.equal(tiny.logits(model), expected)


def test_where_every_gate_is_dead_the_base_is_left(tmp_path):
    model = trained(dead=(4,) * 6)
    report = rw.prune(model)
    assert sorted(report.ranks.values()) == [0, 0, 0, 0, 0, 1]
    torch.testing.assert_close(tiny.logits(model), tiny.logits(tiny.make("llama")), atol=1e-6, rtol=1e-6)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny.make("llama"), tmp_path)
    assert [gate.tolist() for gate in gates(loaded).values()] == [[0.0]]


def test_training_goes_on_with_a_new_optimizer():
    model = trained()
    rw.prune(model)
    before = tiny.logits(model)
    parameters = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    tiny.train(model, 2, rw.sora_optimizer(model, lr=1e-2))
    assert not torch.equal(tiny.logits(model), before)
    for name, p in model.named_parameters():
        assert p.requires_grad == (name in parameters)
        assert not p.requires_grad or not torch.equal(p, parameters[name])


def test_a_scale_that_is_set_later_is_the_right_one():
    """PEFT computes it from the layer's alpha and rank, so these must follow."""
    model = trained()
    rw.prune(model)
    expected = tiny.logits(model)
    for layer in tiny.layers(model).values():
        layer.set_scale("default", 2.0)
    assert not torch.allclose(tiny.logits(model), expected, atol=1e-4)
    for layer in tiny.layers(model).values():
        layer.unscale_layer()
    torch.testing.assert_close(tiny.logits(model), expected, atol=1e-6, rtol=1e-6)


def test_other_adapters_of_the_same_layers_are_left_alone():
    """The layer whose adapter is removed must not switch to the other one."""
    model = trained()
    torch.manual_seed(2)
    model.add_adapter("second", rw.SoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model.set_adapter("second")
    tiny.train(model)
    second = tiny.logits(model)
    model.set_adapter("default")
    first = tiny.logits(model)
    report = rw.prune(model)
    assert report.removed == ("model.layers.0.self_attn.v_proj",)
    torch.testing.assert_close(tiny.logits(model), first, atol=1e-6, rtol=1e-6)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "second" in name)
    model.set_adapter("second")
    assert torch.equal(tiny.logits(model), second)
    assert all(gate.numel() == 2 for gate in gates(model).values()) and len(gates(model)) == 4


def test_trained_biases_are_kept(tmp_path):
    model = trained("bert", bias="lora_only")
    report = rw.prune(model)
    assert not report.removed and min(report.ranks.values()) == 1
    expected = tiny.logits(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny.make("bert"), tmp_path)
    torch.testing.assert_close(tiny.logits(loaded), expected, atol=1e-6, rtol=1e-6)


class Nested(nn.Module):
    """One module's whole name is the end of another's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.ModuleDict({"first": nn.Linear(6, 6)})
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(self.block["first"](x))))


@pytest.mark.parametrize("dead", [{"first": 3}, {"first": 1, "block.first": 2}, {"block.first": 4}, {"first": 4}])
def test_names_that_end_alike(tmp_path, dead):
    torch.manual_seed(1)
    settings = {"r": 4, "target_modules": ["first", "second"], "init_lora_weights": False}
    model = peft.get_peft_model(Nested(), rw.SoraConfig(**settings))
    for name, number in dead.items():
        gates(model)[name].data[:number] = 0
    x = torch.randn(5, 6)
    expected = model(x)
    report = rw.prune(model)
    torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-6)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(Nested(), tmp_path)
    torch.testing.assert_close(loaded(x), expected, atol=1e-6, rtol=1e-6)
    kept = {name: rank for name, rank in report.ranks.items() if rank}
    assert {name: gate.numel() for name, gate in gates(loaded).items()} == kept


def test_a_model_without_gates_is_refused():
    model = peft.get_peft_model(tiny.make("llama"), rw.MiloraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UserError, match=r"no gates \(MiloraConfig\)"):
        rw.prune(model)
