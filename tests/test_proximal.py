from __future__ import annotations

import math

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rankwise as rw
import tiny
from rankwise.errors import UserError
from rankwise.ranks import attach_proximal_step, gates, published_step, soft_threshold

numbers = st.floats(-100, 100, allow_nan=False)
thresholds = st.floats(0, 50, allow_nan=False)


def adapt(**settings) -> peft.PeftModel:
    config = {"r": 4, "target_modules": tiny.TARGETS["llama"], "l1": 0.0, "threshold": 0.0} | settings
    torch.manual_seed(1)
    return peft.get_peft_model(tiny.make("llama"), rw.SoraConfig(**config))


def gate_values(model: peft.PeftModel) -> dict[str, torch.Tensor]:
    return {name: gate.detach().clone() for name, gate in gates(model).items()}


def test_soft_threshold_by_hand():
    x = torch.tensor([1.9, -1.9, 1.0, 0.4, -0.4, 0.0, -3.0])
    expected = torch.tensor([0.9, -0.9, 0.0, 0.0, 0.0, 0.0, -2.0])
    torch.testing.assert_close(soft_threshold(x, 1.0), expected)
    assert torch.equal(soft_threshold(x, 0.0), x)


def test_published_step_by_hand():
    """Between one and two thresholds it gives zero, where the proximal step gives x - 1."""
    x = torch.tensor([1.9, -1.9, 2.5, -2.5, 0.5])
    torch.testing.assert_close(published_step(x, 1.0), torch.tensor([0.0, 0.0, 1.5, -1.5, 0.0]))


@pytest.mark.parametrize("threshold", [-0.1, float("nan")])
@pytest.mark.parametrize("step", [soft_threshold, published_step])
def test_a_threshold_below_zero_is_refused(step, threshold):
    with pytest.raises(UserError, match=f"threshold {threshold} is not possible"):
        step(torch.ones(2), threshold)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(numbers, thresholds)
def test_soft_threshold_is_the_proximal_map(x, threshold):
    """It minimises (x - z)^2 / 2 + t |z|: by a search over a fine grid around the line between 0 and x."""
    grid = np.linspace(min(x, 0) - 1, max(x, 0) + 1, 40_001)
    costs = 0.5 * (x - grid) ** 2 + threshold * np.abs(grid)
    found = float(soft_threshold(torch.tensor([x], dtype=torch.float64), threshold))
    assert abs(found - grid[costs.argmin()]) <= grid[1] - grid[0]
    assert 0.5 * (x - found) ** 2 + threshold * abs(found) <= costs.min() + 1e-9


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(numbers, min_size=1, max_size=6), thresholds)
def test_soft_threshold_is_odd_contracts_and_adds_up(values, threshold):
    x = torch.tensor(values, dtype=torch.float64)
    y = x.flip(0) / 2 + 1
    shrunk = soft_threshold(x, threshold)
    assert torch.equal(soft_threshold(-x, threshold), -shrunk)
    assert (shrunk.abs() <= x.abs()).all()
    assert ((shrunk - soft_threshold(y, threshold)).abs() <= (x - y).abs() + 1e-9).all()
    twice = soft_threshold(soft_threshold(x, threshold / 2), threshold / 2)
    torch.testing.assert_close(twice, shrunk, atol=1e-9, rtol=1e-9)


def test_groups_rates_and_decay():
    """All that is trained is in one group or the other, once; gates have a rate of their own and no decay."""
    model = adapt()
    made = rw.sora_optimizer(model, lr=1e-3, gate_lr=5e-2, weight_decay=0.1, betas=(0.8, 0.9))
    assert isinstance(made, torch.optim.AdamW)
    others, of_gates = made.param_groups
    assert {id(p) for p in of_gates["params"]} == {id(p) for p in gates(model).values()}
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(trained) == sorted(id(p) for group in made.param_groups for p in group["params"])
    assert (others["lr"], others["weight_decay"]) == (1e-3, 0.1)
    assert (of_gates["lr"], of_gates["weight_decay"]) == (5e-2, 0.0)
    assert others["betas"] == of_gates["betas"] == (0.8, 0.9)


def test_gates_take_the_common_rate_where_they_have_none():
    assert [group["lr"] for group in rw.sora_optimizer(adapt(), lr=3e-3).param_groups] == [3e-3, 3e-3]


def test_an_adapter_without_gates_is_refused():
    model = peft.get_peft_model(tiny.make("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match=r"no gates \(LoraConfig\).*SoraConfig"):
        rw.sora_optimizer(model, lr=1e-3)


@pytest.mark.parametrize("mode", ["proximal", "reference"])
def test_a_step_of_sgd_by_hand(mode):
    """g <- shrink(g - lr (gradient + l1 sign(g) / number of gates)), with a threshold that is not scaled by lr."""
    model = adapt(l1=2.0, threshold=0.3, mode=mode)
    optimizer = rw.sora_optimizer(model, torch.optim.SGD, lr=0.1, gate_lr=0.5)
    tiny.loss(model).backward()
    before, count = gate_values(model), sum(gate.numel() for gate in gates(model).values())
    assert count == 4 * 6
    gradients = {name: gate.grad.clone() for name, gate in gates(model).items()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and "gate" not in name}
    others = {name: p.detach().clone() for name, p in trained.items()}
    other_gradients = {name: p.grad.clone() for name, p in trained.items()}
    optimizer.step()
    zeroed = 0
    for name, gate in gate_values(model).items():
        moved = before[name] - 0.5 * (gradients[name] + 2.0 * before[name].sign() / count)
        shrunk = moved.sign() * (moved.abs() - 0.3).clamp(min=0)
        if mode == "reference":
            shrunk[shrunk.abs() < 0.3] = 0
        torch.testing.assert_close(gate, shrunk, atol=1e-7, rtol=1e-6)
        zeroed += int((shrunk == 0).sum())
    assert 0 < zeroed < count
    for name, p in trained.items():
        torch.testing.assert_close(p.detach(), others[name] - 0.1 * other_gradients[name])


def test_modes_differ_between_one_and_two_thresholds():
    zeros = {}
    for mode in ("proximal", "reference"):
        model = adapt(threshold=0.3, mode=mode)
        optimizer = rw.sora_optimizer(model, torch.optim.SGD, lr=1e-9)
        tiny.loss(model).backward()
        optimizer.step()
        zeros[mode] = sum(int((gate == 0).sum()) for gate in gates(model).values())
    assert zeros["proximal"] < zeros["reference"]


def test_a_step_of_adamw_by_hand():
    """At the first step m / sqrt(v) = grad / |grad|, so g <- shrink(g - lr grad / (|grad| + eps)); no decay."""
    model = adapt(threshold=0.05, l1=10.0)
    optimizer = rw.sora_optimizer(model, lr=1e-3, gate_lr=0.02, weight_decay=0.5)
    tiny.loss(model).backward()
    before = gate_values(model)
    gradients = {name: gate.grad + 10.0 * gate.detach().sign() / (4 * 6) for name, gate in gates(model).items()}
    optimizer.step()
    for name, gate in gate_values(model).items():
        moved = before[name] - 0.02 * gradients[name] / (gradients[name].abs() + 1e-8)
        expected = torch.tensor([math.copysign(max(abs(float(g)) - 0.05, 0), float(g)) for g in moved])
        torch.testing.assert_close(gate, expected, atol=1e-6, rtol=1e-5)


def test_the_l1_gradient_is_that_of_its_term_in_the_loss():
    """Two steps of SGD with momentum equal those with l1 * mean |g| added to the loss itself."""
    ours, reference = adapt(l1=3.0), adapt()
    optimizer = rw.sora_optimizer(ours, torch.optim.SGD, lr=0.1, momentum=0.9)
    plain = torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        plain.zero_grad()
        tiny.loss(ours).backward()
        (tiny.loss(reference) + 3.0 * torch.cat(list(gates(reference).values())).abs().mean()).backward()
        optimizer.step()
        plain.step()
    for name, gate in gate_values(ours).items():
        torch.testing.assert_close(gate, gate_values(reference)[name], atol=1e-6, rtol=1e-5)


def test_a_gate_without_gradient_of_l1_stays_zero_and_may_grow_again():
    """sign(0) = 0: the L1 term does not move a zero gate, the gradient of the loss does."""
    model = adapt(l1=10.0)
    for gate in gates(model).values():
        gate.data.zero_()
    optimizer = rw.sora_optimizer(model, torch.optim.SGD, lr=0.1)
    for gate in gates(model).values():
        gate.grad = torch.zeros_like(gate)
    optimizer.step()
    assert all((gate == 0).all() for gate in gates(model).values())
    for gate in gates(model).values():
        gate.grad = torch.ones_like(gate)
    optimizer.step()
    torch.testing.assert_close(next(iter(gates(model).values())).detach(), torch.full((4,), -0.1))


def test_settings_may_change_between_steps():
    model = adapt()
    optimizer = rw.sora_optimizer(model, torch.optim.SGD, lr=1e-9)
    tiny.loss(model).backward()
    before = gate_values(model)
    optimizer.step()
    for name, gate in gate_values(model).items():
        torch.testing.assert_close(gate, before[name])
    model.peft_config["default"].threshold = 1.0
    optimizer.step()
    for name, gate in gate_values(model).items():
        torch.testing.assert_close(gate, soft_threshold(before[name], 1.0))


def test_only_the_optimizers_own_step_shrinks():
    """A gradient scaler that finds an overflow does not call step(): then no gate is shrunk either."""
    model = adapt(threshold=0.5)
    optimizer = rw.sora_optimizer(model, torch.optim.SGD, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = gate_values(model)
    scaler.scale(tiny.loss(model)).backward()
    next(iter(gates(model).values())).grad[0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    assert all(torch.equal(gate, before[name]) for name, gate in gate_values(model).items())
    scaler.scale(tiny.loss(model)).backward()
    scaler.step(optimizer)
    assert not any(torch.equal(gate, before[name]) for name, gate in gate_values(model).items())


def test_the_step_attaches_to_any_optimizer():
    model = adapt(threshold=0.5)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-9)
    attach_proximal_step(optimizer, model)
    before = gate_values(model)
    tiny.loss(model).backward()
    optimizer.step()
    for name, gate in gate_values(model).items():
        torch.testing.assert_close(gate, soft_threshold(before[name], 0.5))


def test_a_threshold_times_the_learning_rate_of_the_gates():
    """The paper's lambda: eta_t lambda, where eta_t is the current rate of the gates."""
    model = adapt(threshold=40.0, threshold_scaling="learning_rate")
    optimizer = rw.sora_optimizer(model, torch.optim.SGD, lr=0.1, gate_lr=0.01)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.grad = torch.zeros_like(parameter)
    expected = gate_values(model)
    for rate in (0.01, 0.005):
        optimizer.param_groups[1]["lr"] = rate
        optimizer.step()
        expected = {name: soft_threshold(gate, 40 * rate) for name, gate in expected.items()}
    for name, gate in gate_values(model).items():
        torch.testing.assert_close(gate, expected[name])


def test_a_threshold_that_closes_every_gate_stops_with_the_gates_as_they_were():
    model = adapt(threshold=100.0)
    optimizer = rw.sora_optimizer(model, lr=1e-3)
    before = gate_values(model)
    tiny.loss(model).backward()
    with pytest.raises(
        UserError, match=r"a threshold of 100 closed every one of 24 gates at step 1 .* lower the thres"
    ):
        optimizer.step()
    assert all(torch.equal(gate, before[name]) for name, gate in gate_values(model).items())


def test_two_steps_of_adamw_worked_by_hand():
    """One gate, g0 = 0.5, gradient of the loss 0.2 then -0.1, l1 = 0.3 over one gate, rate 0.1, threshold 0.05.

    Step 1: G = 0.2 + 0.3 = 0.5; m = 0.05, v = 0.00025; m^ = 0.5, v^ = 0.25; g = 0.5 - 0.1 (0.5 / 0.5) = 0.4, then 0.35.
    Step 2: G = -0.1 + 0.3 = 0.2; m = 0.9 (0.05) + 0.1 (0.2) = 0.065, v = 0.999 (0.00025) + 0.001 (0.04) = 0.00028975;
    m^ = 0.065 / 0.19 = 0.34210526, v^ = 0.00028975 / 0.001999 = 0.14494747; sqrt v^ = 0.38072;
    g = 0.35 - 0.1 (0.34210526 / 0.38072) = 0.260142, then 0.210142.
    """
    torch.manual_seed(0)
    config = rw.SoraConfig(r=1, target_modules=["0"], l1=0.3, threshold=0.05)
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), config)
    [gate] = gates(model).values()
    gate.data.fill_(0.5)
    optimizer = rw.sora_optimizer(model, lr=1.0, gate_lr=0.1, weight_decay=0.7)
    for gradient, expected in ((0.2, 0.35), (-0.1, 0.210142)):
        gate.grad = torch.tensor([gradient])
        optimizer.step()
        assert float(gate) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("way", ["accumulated", "scaled", "clipped", "bfloat16"])
def test_the_step_comes_last(way):
    """Gradients are summed, unscaled and clipped as ever; then come the L1 term, the step, and the shrinking."""
    model, reference = adapt(l1=2.0, threshold=0.1), adapt()
    optimizer = rw.sora_optimizer(model, torch.optim.SGD, lr=0.5, weight_decay=0.3)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=way == "scaled")
    for one in (model, reference):
        for batch in range(2 if way == "accumulated" else 1):
            with torch.autocast("cpu", torch.bfloat16, enabled=way == "bfloat16"):
                loss = tiny.loss(one) * (1 + batch)
            (scaler.scale(loss) if one is model else loss).backward()
        if way == "clipped":
            torch.nn.utils.clip_grad_norm_(one.parameters(), 0.05)
    before = gate_values(model)
    scaler.step(optimizer)
    for name, gate in gates(reference).items():
        moved = before[name] - 0.5 * (gate.grad + 2.0 * before[name].sign() / 24)
        torch.testing.assert_close(gate_values(model)[name], soft_threshold(moved, 0.1), atol=1e-6, rtol=1e-5)


def test_the_published_rule_by_its_published_values():
    x = torch.tensor([1.2, 1.9, 2.1, 3.0])
    torch.testing.assert_close(published_step(x, 1.0), torch.tensor([0.0, 0.0, 1.1, 2.0]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(numbers, min_size=1, max_size=20), thresholds)
def test_soft_threshold_equals_numpy(values, threshold):
    x = np.array(values)
    expected = np.sign(x) * np.maximum(np.abs(x) - threshold, 0)
    found = soft_threshold(torch.tensor(values, dtype=torch.float64), threshold).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-12)
