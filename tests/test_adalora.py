from __future__ import annotations

import warnings

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import tiny
import tiny_adalora
from rankwise.errors import UserError
from rankwise.ranks import AdaloraAllocation, adalora_ranks
from rankwise.ranks.adalora.allocation import Allocated, set_schedule
from tiny_adalora import STEPS, adapt, allocate, live


@pytest.mark.parametrize("settings", [{}, {"deltaT": 3}, {"tfinal": 0}, {"tinit": 0}])
def test_a_training_equals_the_loop_over_pefts_own_allocator(settings):
    """The reference calls update_and_allocate after each step; ranks and all weights are the same."""
    model, reference = adapt(**settings), tiny_adalora.peft_loop(adapt(**settings))
    allocation = allocate(model)
    assert adalora_ranks(model) == live(reference)
    assert len(set(adalora_ranks(model).values())) > 1
    for name, value in tiny_adalora.factors(reference).items():
        torch.testing.assert_close(tiny_adalora.factors(model)[name], value, atol=1e-6, rtol=1e-6)
    assert model.peft_config["default"].rank_pattern == reference.peft_config["default"].rank_pattern
    assert allocation.history[-1] == Allocated(allocation.last, 2 * len(live(model)), 2 * len(live(model)))


def test_the_budget_falls_with_the_cube_of_what_is_left():
    """Six layers: from 24 directions at step 3 to 12 at step 10, 12 (1 - (t - 3) / 7)^3 + 12 between, rounded down."""
    allocation = allocate(adapt())
    expected = [int(12 * (1 - (step - 3) / 7) ** 3 + 12) for step in range(4, 11)]
    assert allocation.history == [Allocated(step, budget, budget) for step, budget in enumerate(expected, 4)]


def unfinished(steps: int, announced: int = 1) -> AdaloraAllocation:
    """An allocation in mid-training, each of whose steps was announced so many times."""
    model = adapt()
    allocation, optimizer = AdaloraAllocation(model, STEPS), tiny_adalora.adamw(model)
    for number in range(1, steps + 1):
        tiny.loss(model).backward()
        optimizer.step()
        for _ in range(announced):
            allocation.step(number)
        allocation.step(number - 1)
        optimizer.zero_grad()
    return allocation


def assert_same_state(one: AdaloraAllocation, other: AdaloraAllocation) -> None:
    assert (one.history, one.skipped, one._done, one._kept) == (other.history, other.skipped, other._done, other._kept)
    for name in ("exp_avg_ipt", "exp_avg_unc"):
        found, expected = getattr(one.allocator, name), getattr(other.allocator, name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in found.items())


@pytest.mark.parametrize("steps", [2, 7, 12])
def test_a_step_counts_once(steps):
    assert_same_state(unfinished(steps, announced=2), unfinished(steps))


@pytest.mark.parametrize("steps", [2, 7, 12])
def test_an_allocation_is_saved_and_loaded(tmp_path, steps):
    """In the warm-up, while ranks fall, and when they stay."""
    saved, loaded = unfinished(steps), AdaloraAllocation(adapt(), STEPS)
    saved.save(tmp_path / "adalora.safetensors")
    loaded.load(tmp_path / "adalora.safetensors", steps)
    assert_same_state(loaded, saved)
    assert bool(saved.allocator.exp_avg_ipt) == (steps < 10)
    other = AdaloraAllocation(adapt(init_r=5), STEPS)
    with pytest.raises(UserError, match="or of another adapter: resume from its own folder"):
        other.load(tmp_path / "adalora.safetensors", steps)
    (tmp_path / "adalora.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="is not readable as safetensors"):
        loaded.load(tmp_path / "adalora.safetensors", steps)


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors, counts: tensors.pop(next(name for name in tensors if name.startswith("uncertainty"))),
        lambda tensors, counts: counts.pop("history"),
        lambda tensors, counts: counts.pop("skipped"),
        lambda tensors, counts: counts.update(history="[[1, 2]]"),
        lambda tensors, counts: counts.update(history='["x"]'),
        lambda tensors, counts: counts.update(history="3"),
        lambda tensors, counts: counts.update(skipped="[]"),
        lambda tensors, counts: counts.update(step="["),
        lambda tensors, counts: counts.update(step="99"),
        lambda tensors, counts: tensors.update(more=torch.ones(2)),
    ],
)
def test_an_allocation_that_is_damaged_is_told_and_not_taken_over(tmp_path, damage):
    saved, loaded, fresh = unfinished(7), AdaloraAllocation(adapt(), STEPS), AdaloraAllocation(adapt(), STEPS)
    path = tmp_path / "adalora.safetensors"
    saved.save(path)
    with safe_open(path, "pt") as file:
        tensors, counts = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    damage(tensors, counts)
    save_file(tensors, path, counts)
    with pytest.raises(UserError, match=r"adalora.safetensors is .*: resume from"):
        loaded.load(path, 7)
    assert_same_state(loaded, fresh)


def test_gradients_that_are_not_finite_leave_the_importance_as_it_was():
    model = adapt()
    allocation = AdaloraAllocation(model, STEPS)
    for number in (1, 2):
        tiny.loss(model).backward()
        allocation.step(number)
        model.zero_grad()
    before = {name: value.clone() for name, value in allocation.allocator.exp_avg_ipt.items()}
    tiny.loss(model).backward()
    next(p for name, p in model.named_parameters() if "lora_A" in name).grad[0, 0] = torch.nan
    allocation.step(3)
    assert allocation.skipped == 1
    assert all(torch.equal(value, before[name]) for name, value in allocation.allocator.exp_avg_ipt.items())
    assert any(value.any() for value in before.values())


class Unused(nn.Module):
    """A model of which one layer never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.idle = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.tanh(self.one(x)))


def test_a_layer_without_gradients_is_cut_and_does_not_crash():
    """PEFT by itself multiplies a weight by None. The idle layer ends at rank 0, and the budget goes to the rest."""
    torch.manual_seed(0)
    targets = ["one", "two", "idle"]
    model = peft.get_peft_model(Unused(), tiny_adalora.config(target_modules=targets, task_type=None))
    allocation, optimizer = AdaloraAllocation(model, STEPS), tiny_adalora.adamw(model)
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    for number in range(1, STEPS + 1):
        (model(x) - x).square().mean().backward()
        optimizer.step()
        allocation.step(number)
        optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    allocation.finish()
    assert adalora_ranks(model)["idle"] == 0
    assert sum(adalora_ranks(model).values()) == 6


def test_a_step_after_the_gradients_are_gone_is_an_error():
    model = adapt()
    allocation = AdaloraAllocation(model, STEPS)
    with pytest.raises(UserError, match=r"call step after loss.backward\(\) and before zero_grad\(\)"):
        allocation.step(1)


def test_pefts_own_call_beside_ours_is_an_error():
    model = adapt()
    allocation = AdaloraAllocation(model, STEPS)
    with pytest.raises(UserError, match="update_and_allocate was called beside"):
        for number in range(1, STEPS):
            tiny.loss(model).backward()
            model.base_model.update_and_allocate(number)
            allocation.step(number)


def test_a_budget_that_is_not_met_is_told():
    with pytest.warns(UserWarning, match="left 24 live directions, its budget is 12: training ended at step 2, before"):
        allocate(adapt(), steps=2)
    model = adapt()
    with pytest.warns(UserWarning, match="none of the gradients until step 10 were finite"):
        allocation = AdaloraAllocation(model, STEPS)
        for number in range(1, STEPS + 1):
            (tiny.loss(model) * torch.nan).backward()
            allocation.step(number)
            model.zero_grad()
        allocation.finish()
    assert allocation.skipped == 9 and allocation.history == [] and model.peft_config["default"].rank_pattern is None


def test_nothing_is_told_of_a_training_that_met_its_budget():
    model = adapt()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        allocate(model)


def test_ranks_are_of_the_live_directions():
    model = adapt()
    assert set(adalora_ranks(model).values()) == {0}  # E starts at zero
    tiny.train(model, 1)
    assert set(adalora_ranks(model).values()) == {4}
    with pytest.raises(UserError, match="is of LoraConfig: this is for"):
        adalora_ranks(tiny.adapted("llama"))


def test_a_schedule_is_laid_over_a_training():
    model = adapt()
    set_schedule(model, 40, warmup_share=0.1, final_share=0.5)
    config = model.peft_config["default"]
    assert (config.total_step, config.tinit, config.tfinal) == (40, 4, 20)
    assert model.base_model.rankallocator.budget_schedule(20) == (12, True)
    with pytest.raises(UserError, match="AdaLoRA has 3 steps, of which 2 are its warm-up and 1 its end"):
        set_schedule(model, 3, warmup_share=0.55, final_share=0.4)
