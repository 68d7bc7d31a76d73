from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

import rankwise as rw
import tiny
import tiny_families
import tiny_modules
from rankwise.errors import UserError
from rankwise.ranks import attached_steps, gates
from rankwise.ranks.sora import gate_steps
from tiny_gates import adapt, step


def states(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything that the optimizer keeps, of open directions alone, by parameter and by name."""
    open_by_layer = {name: gate.detach() != 0 for name, gate in gates(model).items()}
    found = {}
    for name, layer in tiny.layers(model).items():
        if name not in open_by_layer or not open_by_layer[name].any():
            continue
        mask = open_by_layer[name]
        parts = {"A": (layer.lora_A["default"].weight, 0), "B": (layer.lora_B["default"].weight, 1)}
        parts["gate"] = (layer.lora_gate["default"], 0)
        for part, (parameter, axis) in parts.items():
            values = {"value": parameter.detach()} | optimizer.state[parameter]
            for key, value in values.items():
                if value.ndim:
                    value = value[mask] if axis == 0 else value[:, mask]
                found[f"{name}.{part}.{key}"] = value.clone()
    return found


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (torch.optim.AdamW, {"weight_decay": 0.0}),
        (torch.optim.AdamW, {"amsgrad": True, "weight_decay": 0.0}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.RMSprop, {"eps": 1e-3}),
        (torch.optim.Adagrad, {}),
    ],
    ids=lambda value: getattr(value, "__name__", "+".join(value) if isinstance(value, dict) else None),
)
def test_cutting_changes_nothing_while_cut_gates_would_have_stayed_closed(kind, settings):
    """Losses, values and the optimizer's state are those of a training without cuts, at every step.

    In float64 (but for the model's norms), so that the order in which numbers are added makes no difference.
    """
    ours, plain = adapt(0.03, torch.float64, shrink_after=2), adapt(0.03, torch.float64)
    rate = 1e-2 if kind is torch.optim.SGD else 1e-3
    one = rw.sora_optimizer(ours, kind, lr=rate, gate_lr=1e-4, **settings)
    other = rw.sora_optimizer(plain, kind, lr=rate, gate_lr=1e-4, **settings)
    sizes = []
    for _ in range(10):
        assert step(ours, one) == pytest.approx(step(plain, other), abs=1e-6)
        expected, found = states(other, plain), states(one, ours)
        assert expected.keys() == found.keys() and expected
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-7, rtol=1e-6)
        sizes.append(sum(gate.numel() for gate in gates(ours).values()))
    assert sizes[0] == 24 and sizes[-1] < sizes[4] < 24
    assert sum(gate.numel() for gate in gates(plain).values()) == 24
    torch.testing.assert_close(tiny.logits(ours), tiny.logits(plain), atol=1e-6, rtol=1e-6)


def test_an_optimizer_that_keeps_rows_and_columns_goes_on():
    """Adafactor's statistics are means over a matrix, dead directions too: they are cut, but a step is not the same."""
    model = adapt(small=0.03, shrink_after=1)
    optimizer = rw.sora_optimizer(model, torch.optim.Adafactor, lr=1.0, gate_lr=1e-4)
    losses = [step(model, optimizer) for _ in range(9)]
    assert sum(gate.numel() for gate in gates(model).values()) < 20
    layer = next(iter(tiny.layers(model).values()))
    assert optimizer.state[layer.lora_A["default"].weight]["row_var"].shape == (layer.r["default"], 1)
    assert losses[-1] < losses[0]


def test_a_gate_is_cut_when_it_was_closed_for_so_many_steps():
    model = adapt(shrink_after=3, threshold=0.0)
    optimizer = rw.sora_optimizer(model, torch.optim.SGD, lr=1e-9)
    name, gate = next(iter(gates(model).items()))
    gate.data[1] = 0
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.grad = torch.zeros_like(parameter)
    lengths = []
    for _ in range(4):
        optimizer.step()
        lengths.append(gates(model)[name].numel())
    assert lengths == [4, 4, 3, 3]


def test_a_gate_that_opens_again_starts_its_wait_anew():
    model = adapt(shrink_after=3, threshold=0.0)
    optimizer = rw.sora_optimizer(model, torch.optim.SGD, lr=1.0)
    gate = next(iter(gates(model).values()))
    gate.data[1] = 0
    for opens in (False, False, True, False, False, False):
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.grad = torch.zeros_like(parameter)
        gate.grad[1] = -1.0 if opens else gate.detach()[1].clone()  # opens the gate, or closes it again
        optimizer.step()
        assert gate.numel() == 4 or gate.numel() == 3
    assert gate.numel() == 3


def test_a_layer_without_an_open_gate_loses_its_adapter_while_training_goes_on():
    model = adapt(shrink_after=1, threshold=0.0)
    optimizer = rw.sora_optimizer(model, lr=1e-3)
    name, gate = next(iter(gates(model).items()))
    step(model, optimizer)
    attached_steps(optimizer).config.threshold = 1.0
    gate.data.zero_()
    step(model, optimizer)
    assert name not in gates(model)
    assert type(model.get_base_model().get_submodule(name)) is nn.Linear
    left = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert left == {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in optimizer.state}
    attached_steps(optimizer).config.threshold = 0.0
    before = tiny.logits(model)
    step(model, optimizer)
    assert not torch.equal(tiny.logits(model), before)


@pytest.mark.parametrize("kind", tiny_modules.KINDS)
@pytest.mark.parametrize("part", [None, "minor"])
def test_every_kind_of_module_is_cut(kind, part):
    torch.manual_seed(0)
    settings = {"gate_init": "ones", "threshold": 0.0, "shrink_after": 1, "part": part, "l1": 0.0}
    model, x = tiny_modules.adapt(kind, rw.SoraConfig, **settings)
    tiny_modules.train(model, x)
    optimizer = rw.sora_optimizer(model, lr=0.0)
    [gate] = gates(model).values()
    gate.data[1] = 0
    expected = model(x).detach()
    (model(x) - 1).square().mean().backward()
    gate.grad.zero_()
    optimizer.step()
    optimizer.zero_grad()
    assert gate.shape == (2,)
    torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-6)
    optimizer.param_groups[0]["lr"] = 1e-2
    (model(x) - 1).square().mean().backward()
    optimizer.step()
    assert not torch.allclose(model(x), expected, atol=1e-6)


@pytest.mark.parametrize("family", list(tiny_families.FAMILIES))
def test_pruned_and_unpruned_agree_on_every_family_and_load_in_plain_peft(family, tmp_path):
    base = tiny_families.make(family)
    torch.manual_seed(1)
    model = peft.get_peft_model(base, rw.SoraConfig(r=4, target_modules=tiny_families.targets(family, base)))
    tiny_families.train(model.eval(), family)
    generator = torch.Generator().manual_seed(2)
    for number, gate in enumerate(gates(model).values()):
        gate.data[torch.rand(4, generator=generator) < (0.5 if number % 3 else 1.0)] = 0
    expected = tiny_families.logits(model, family)
    report = rw.prune(model)
    assert report.removed and report.parameters < report.parameters_before
    scale = float(expected.abs().max())
    torch.testing.assert_close(tiny_families.logits(model, family), expected, atol=1e-6 * scale, rtol=1e-6)
    rw.export(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_families.make(family), tmp_path).eval()
    assert loaded.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(tiny_families.logits(loaded, family), expected, atol=2e-6 * scale, rtol=1e-5)


def test_merging_while_gates_are_cut_is_refused():
    model = adapt(small=0.03, shrink_after=1)
    optimizer = rw.sora_optimizer(model, lr=1e-3)
    tiny.loss(model).backward()
    model.merge_adapter()
    with pytest.raises(UserError, match="default is merged into the weights while gates are trained: call unm"):
        for _ in range(6):
            optimizer.step()


def test_a_state_that_cannot_be_cut_is_refused_and_nothing_is_changed():
    model = adapt(shrink_after=1, threshold=0.0)
    optimizer = rw.sora_optimizer(model, lr=1e-3)
    step(model, optimizer)
    name, layer = next(iter(tiny.layers(model).items()))
    optimizer.state[layer.lora_A["default"].weight]["absmax"] = torch.ones(7)
    gates(model)[name].data[0] = 0
    attached_steps(optimizer).config.threshold = 1e-2
    with pytest.raises(UserError, match=rf"{name}: AdamW keeps 'absmax' of shape \(7,\).*cannot be cut by direction"):
        step(model, optimizer)
    assert layer.lora_A["default"].weight.shape == (4, 16) and gates(model)[name].shape == (4,)


def test_several_processes_hold_closed_what_one_cuts(monkeypatch):
    """Losses are the same at each step, and what is left after pruning; as on processes that all see the same rows."""
    alone, one_of_two = adapt(0.03, torch.float64, shrink_after=2), adapt(0.03, torch.float64, shrink_after=2)
    settings = {"lr": 1e-3, "gate_lr": 1e-4, "weight_decay": 0.0}
    cutting, holding = (rw.sora_optimizer(model, **settings) for model in (alone, one_of_two))
    sizes = {name: gate.shape for name, gate in gates(one_of_two).items()}
    for _ in range(8):
        expected = step(alone, cutting)
        with monkeypatch.context() as patched:
            patched.setattr(gate_steps, "world_size", lambda: 2)
            patched.setattr(gate_steps, "where_all", lambda wanted: wanted)
            assert step(one_of_two, holding) == pytest.approx(expected, abs=1e-6)
    assert {name: gate.shape for name, gate in gates(one_of_two).items()} == sizes
    assert attached_steps(holding).held.any()
    assert attached_steps(holding).removed == attached_steps(cutting).removed
    rw.prune(one_of_two)
    rw.prune(alone)
    left = {name: gate.detach() for name, gate in gates(alone).items()}
    assert left.keys() == gates(one_of_two).keys() and sum(map(len, left.values())) < sum(
        size[0] for size in sizes.values()
    )
    for name, gate in gates(one_of_two).items():
        torch.testing.assert_close(gate.detach(), left[name])


def test_a_gate_that_is_held_does_not_come_back(monkeypatch):
    """Not even where its gradient would open it again: one process has cut it."""
    model = adapt(0.03, shrink_after=1)
    optimizer = rw.sora_optimizer(model, lr=1e-3, gate_lr=1.0)
    monkeypatch.setattr(gate_steps, "world_size", lambda: 2)
    monkeypatch.setattr(gate_steps, "where_all", lambda wanted: wanted)
    step(model, optimizer)
    held = attached_steps(optimizer).held.clone()
    assert held.any() and not held.all()
    for _ in range(3):
        step(model, optimizer)
        assert not attached_steps(optimizer).gates.read()[held].any()
    loaded = rw.sora_optimizer(model, lr=1e-3)
    loaded.load_state_dict(optimizer.state_dict())
    assert torch.equal(attached_steps(loaded).held, attached_steps(optimizer).held)


def test_another_training_begins_without_what_an_earlier_one_held(monkeypatch):
    """Gates are loaded open again for a stage that starts from an earlier one; those that are zero stay so."""
    model = adapt(0.03, shrink_after=1)
    monkeypatch.setattr(gate_steps, "world_size", lambda: 2)
    monkeypatch.setattr(gate_steps, "where_all", lambda wanted: wanted)
    first = rw.sora_optimizer(model, lr=1e-3, gate_lr=1.0)
    step(model, first)
    held = attached_steps(first).held.clone()
    again = rw.sora_optimizer(model, lr=1e-3, gate_lr=1.0)
    assert torch.equal(attached_steps(again).held, held) and held.any()
    for gate in gates(model).values():
        gate.data.fill_(1.0)
    other = rw.sora_optimizer(model, lr=1e-3, gate_lr=1e-3)
    assert not attached_steps(other).held.any()
    tiny.loss(model).backward()
    assert all(gate.grad.all() for gate in gates(model).values())


def test_one_process_cuts_what_several_held(monkeypatch):
    """Not even a large step of a gate opens it before."""
    model = adapt(0.03, shrink_after=2)
    optimizer = rw.sora_optimizer(model, lr=1e-3, gate_lr=1.0)
    with monkeypatch.context() as patched:
        patched.setattr(gate_steps, "world_size", lambda: 2)
        patched.setattr(gate_steps, "where_all", lambda wanted: wanted)
        attached_steps(optimizer).config.shrink_after = 1
        step(model, optimizer)
    state, held = optimizer.state_dict(), attached_steps(optimizer).held
    left = sum(map(len, gates(model).values())) - int(held.sum())
    alone = rw.sora_optimizer(model, lr=1e-3, gate_lr=1.0)
    alone.load_state_dict(state)
    step(model, alone)
    assert held.any() and sum(map(len, gates(model).values())) <= left


def test_a_gate_is_held_where_all_processes_have_seen_it_closed(monkeypatch):
    """They are the same on each; where one of them is not, it is left alone."""
    model = adapt(0.03, shrink_after=1)
    optimizer = rw.sora_optimizer(model, lr=1e-3)
    monkeypatch.setattr(gate_steps, "world_size", lambda: 2)
    monkeypatch.setattr(gate_steps, "where_all", torch.zeros_like)
    step(model, optimizer)
    assert not attached_steps(optimizer).held.any()


def test_an_optimizer_that_got_other_weights_since_is_refused():
    """As DeepSpeed does, which trains flat copies: the gates would be shrunk before they are written back."""
    model = adapt(0.03)
    optimizer = rw.sora_optimizer(model, lr=1e-3)
    copies = [[nn.Parameter(weight.detach().clone()) for weight in group["params"]] for group in optimizer.param_groups]
    for group, own in zip(optimizer.param_groups, copies, strict=True):
        group["params"] = own
        own[0].grad = torch.zeros_like(own[0])
    with pytest.raises(UserError, match=r"the optimizer does not have its gate: .* in place of DeepSpeed"):
        optimizer.step()


def test_a_gate_that_is_spread_over_processes_is_refused():
    model = adapt(0.03)
    gate = next(iter(gates(model).values()))
    gate.ds_id, gate.ds_shape = 0, gate.shape  # as ZeRO-3 marks its weights
    with pytest.raises(UserError, match="its gate is spread over processes, which each must see whole"):
        rw.sora_optimizer(model, lr=1e-3)
