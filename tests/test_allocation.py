from __future__ import annotations

import copy
import math

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rankwise as rw
import tiny
import tiny_modules
from rankwise.errors import UserError
from rankwise.peft_bridge.matrices import as_weight, factor_matrices
from rankwise.ranks import importance
from rankwise.ranks.allocating.allocation import allocation_steps, choose

# Importance


def by_hand(family: str, updates: dict[str, Tensor]) -> float:
    """The loss of the base with each layer's weight changed by a matrix, in float64; no adapter is there."""
    base = tiny.make(family).double()
    trained = tiny.layers(tiny.adapted(family))  # for the layout of each weight
    for name, update in updates.items():
        base.get_submodule(name).weight.data += as_weight(trained[name], update)
    return float(loss_of(base))


@torch.no_grad()
def loss_of(model: nn.Module) -> Tensor:
    labels = tiny.LABELS if "query" in str(model) else tiny.IDS
    return model(input_ids=tiny.IDS, labels=labels).loss


def directions_of(model: nn.Module) -> dict[str, list[Tensor]]:
    """Each direction of each layer as a matrix in float64."""
    found = {}
    for name, layer in tiny.layers(model).items():
        b, a = (factor.detach().double() for factor in factor_matrices(layer, "default"))
        found[name] = [layer.scaling["default"] * torch.outer(b[:, i], a[i]) for i in range(len(a))]
    return found


@pytest.mark.parametrize("family", tiny.TARGETS)
def test_scores_are_those_of_models_built_without_and_with_the_direction(family):
    """Models without an adapter, whose weights were changed by hand: by all directions but one, and by that one."""
    model = tiny.adapted(family, r=2)
    found = importance(model, loss_of)
    parts = directions_of(model)
    assert found.keys() == parts.keys()
    whole = {name: torch.stack(each).sum(dim=0) for name, each in parts.items()}
    for name, each in parts.items():
        assert found[name].dtype == torch.float64 and found[name].shape == (2,)
        for number, part in enumerate(each):
            without = by_hand(family, whole | {name: whole[name] - part})
            alone = by_hand(family, {name: part})
            assert float(found[name][number]) == pytest.approx(without - alone, abs=2e-6)
    values = torch.cat(list(found.values()))
    assert float(values.max() - values.min()) > 1e-3  # far above the tolerance


@pytest.mark.parametrize("kind", tiny_modules.KINDS)
def test_a_loss_that_is_linear_in_the_output(kind):
    """With loss L = c . y, and m_r = c . (direction r's part of y), the score is L(model) - L(base) - 2 m_r."""
    torch.manual_seed(1)
    model, x = tiny_modules.adapt(kind, peft.LoraConfig)
    tiny_modules.train(model, x)
    base = tiny_modules.make(kind)[0].double()
    inputs = x if kind == "embedding" else x.double()
    c = torch.randn(base(inputs).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def effect(update: Tensor) -> float:
        return float(((tiny_modules.with_weight(kind, update.numpy(), x) - base(inputs).detach()) * c).sum())

    each = [effect(part) for part in directions_of(model)["only"]]
    found = importance(model, lambda scored: (scored(x).double() * c).sum())["only"]
    expected = torch.tensor([sum(each) - 2 * one for one in each], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    assert max(map(abs, each)) > 1e-2


def test_new_directions_score_what_the_adapter_is_worth():
    """A column of zeros changes nothing: without it the model, alone the base."""
    model = tiny.adapted("llama")
    name = next(iter(tiny.layers(model)))
    rw.ranks.resize_adapter(model, {}, {name: 1})
    found = importance(model, loss_of)[name][-1]
    with model.disable_adapter():
        base = float(loss_of(model))
    assert float(found) == pytest.approx(float(loss_of(model)) - base, abs=1e-6)


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("after", [math.inf, 0, 1, 12, 40])
def test_the_model_is_left_as_it_was(after):
    """B holds a negative zero and a subnormal number, modes are mixed, and ``loss`` may raise."""
    model = tiny.adapted("llama", lora_dropout=0.5)
    model.train()
    next(iter(tiny.layers(model).values())).lora_dropout.eval()
    b = next(iter(tiny.layers(model).values())).lora_B["default"].weight
    b.data[0, 0], b.data[1, 1] = -0.0, 1e-45
    b.grad = torch.ones_like(b)
    next(iter(tiny.layers(model).values())).lora_A["default"].weight.requires_grad_(False)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    values = {name: value.clone().view(torch.int32) for name, value in model.named_parameters()}
    before, calls = modes(model), []

    def loss(scored: nn.Module) -> float:
        calls.append(any(modes(scored).values()) or torch.is_grad_enabled())
        if len(calls) > after:
            raise RuntimeError("no memory")
        return float(loss_of(scored))

    if after == math.inf:
        importance(model, loss)
        assert 2 * 6 * 4 < len(calls) < 2 * 6 * 4 + 9  # where passes begin is found out too
    else:
        with pytest.raises(RuntimeError, match="no memory"):
            importance(model, loss)
    assert not any(calls)  # in evaluation mode, without gradients
    assert modes(model) == before and any(before.values()) and not all(before.values())
    for name, value in model.named_parameters():
        assert torch.equal(value.view(torch.int32), values[name])
    assert not any(layer.disable_adapters for layer in tiny.layers(model).values())
    assert {name for name, value in model.named_parameters() if value.requires_grad} == trained
    assert torch.equal(b.grad, torch.ones_like(b))


def test_only_the_active_adapter_is_ablated():
    model = tiny.adapted("llama")
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    values = copy.deepcopy(model.state_dict())
    assert {len(values) for values in importance(model, loss_of).values()} == {4}
    model.set_adapter("second")
    assert {len(values) for values in importance(model, loss_of).values()} == {2}
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_refused(value):
    model = tiny.adapted("llama")
    expected = tiny.logits(model)
    with pytest.raises(UserError, match=f"the loss of the validation rows is {value}, so that directions cannot"):
        importance(model, lambda scored: value)
    assert torch.equal(tiny.logits(model), expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (rw.MiloraConfig(r=2), r"adapter 'default' is MiloraConfig: make it with peft.LoraConfig"),
        (rw.SoraConfig(r=2), r"adapter 'default' is SoraConfig"),
        (peft.AdaLoraConfig(init_r=2, total_step=9), r"adapter 'default' is AdaLoraConfig"),
        (peft.LoraConfig(r=2, use_dora=True), r"only: its update is one of DoraLinearVariant"),
        (peft.LoraConfig(r=2, bias="lora_only"), r"trains biases \(bias='lora_only', lora_bias=False\)"),
        (peft.LoraConfig(r=2, lora_bias=True), r"trains biases \(bias='none', lora_bias=True\)"),
    ],
    ids=["milora", "sora", "adalora", "dora", "bias", "lora_bias"],
)
def test_another_adapter_than_plain_lora_is_refused(config, message):
    config.target_modules = {"only"}
    model = peft.get_peft_model(tiny_modules.make("linear")[0], config)
    with pytest.raises(UserError, match=message):
        importance(model, lambda scored: 0.0)


def test_an_adapter_that_has_no_effect_now_is_refused():
    model, _ = tiny_modules.adapt("linear", peft.LoraConfig)
    with model.disable_adapter(), pytest.raises(UserError, match="only: its adapter is disabled: undo that first"):
        importance(model, lambda scored: 0.0)
    model.merge_adapter()
    with pytest.raises(UserError, match="only: its adapter is merged"):
        importance(model, lambda scored: 0.0)


# Which to move


def scores(**layers: list[float]) -> dict[str, Tensor]:
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in layers.items()}


def moved(found: dict[str, Tensor], count: int) -> tuple[dict[str, list[int]], dict[str, int]]:
    """Which directions are cut, and how many are added."""
    kept, added = choose(found, count)
    return {name: (~mask).nonzero().flatten().tolist() for name, mask in kept.items()}, added


def test_the_lowest_are_cut_and_the_untouched_layers_grow():
    """Lowest four: 0.0 and 0.1 of q, 0.2 of k, 0.3 of v. Of the rest down (mean 5) comes before up (mean 4.5)."""
    found = scores(q=[0.1, 3, 0.0], k=[2, 0.2, 9], v=[0.3, 8], up=[4, 5], down=[1, 9])
    assert moved(found, 4) == ({"q": [0, 2], "k": [1], "v": [0]}, {"down": 2, "up": 2})
    assert moved(found, 3) == ({"q": [0, 2], "k": [1]}, {"down": 1, "up": 1, "v": 1})  # v's mean is 4.15
    assert moved(found, 2) == ({"q": [0, 2]}, {"down": 1, "up": 1})
    assert moved(found, 1) == ({"q": [2]}, {"down": 1})


def test_round_and_round():
    found = scores(a=[0, 0, 0, 0, 0, 9], b=[5, 5], c=[6, 6])
    assert moved(found, 5) == ({"a": [0, 1, 2, 3, 4]}, {"c": 3, "b": 2})


def test_of_equal_scores_the_first_goes_and_of_equal_means_the_first_grows():
    found = scores(a=[1, 0, 0], b=[0, 2], c=[3, 3], d=[2, 4])
    assert moved(found, 1) == ({"a": [1]}, {"c": 1})
    assert moved(found, 2) == ({"a": [1, 2]}, {"c": 1, "d": 1})
    assert moved(found, 3) == ({"a": [1, 2], "b": [0]}, {"c": 2, "d": 1})


def test_a_layer_may_lose_all():
    found = scores(a=[-2, -1], b=[1, 2])
    assert moved(found, 2) == ({"a": [0, 1]}, {"b": 2})


def test_where_every_layer_loses_some_those_that_keep_one_grow():
    """a and b keep one direction of two, b has the higher mean; c keeps none and gets none."""
    found = scores(a=[0, 5], b=[1, 8], c=[2])
    assert moved(found, 3) == ({"a": [0], "b": [0], "c": [0]}, {"b": 2, "a": 1})


@pytest.mark.parametrize("count", [0, -1, 4, 9])
def test_another_count_is_refused(count):
    with pytest.raises(UserError, match=f"{count} of 4 directions cannot be moved"):
        choose(scores(a=[0, 1], b=[2, 3]), count)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_the_sum_of_the_ranks_stays_and_what_is_cut_is_lowest(data):
    ranks = data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=5))
    values = st.sampled_from([-1.5, 0.0, 0.25, 2.0, 7.0])
    found = scores(**{f"l{n}": [data.draw(values) for _ in range(rank)] for n, rank in enumerate(ranks)})
    count = data.draw(st.integers(1, sum(ranks) - 1))
    kept, added = choose(found, count)
    cut = torch.cat([found[name][~mask] for name, mask in kept.items()])
    stays = torch.cat([value[kept[name]] if name in kept else value for name, value in found.items()])
    assert len(cut) == count == sum(added.values()) and cut.max() <= stays.min()
    assert all(not mask.all() for mask in kept.values()) and min(added.values()) >= 1
    assert not set(kept) & set(added) or set(kept) == set(found)
    assert max(added.values()) - min(added.values()) <= 1


# When


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((100, 5, 0.2, 0.6), (20, 30, 40, 50, 60)),
        ((100, 1, 0.2, 0.6), (20,)),
        ((10, 2, 0.0, 0.99), (1, 9)),  # after a step, and a step is left
        ((7, 3, 0.1, 0.7), (1, 3, 5)),  # 0.7, 2.8 and 4.9
        ((2, 1, 0.5, 0.5), (1,)),
    ],
)
def test_steps_are_even(arguments, expected):
    assert allocation_steps(*arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((100, 0, 0.2, 0.6), "events 0 is not possible: it must be 1 or more"),
        ((100, 2, -0.1, 0.6), r"first -0.1 and last 0.6 are not possible: 0 <= first <= last < 1"),
        ((100, 2, 0.6, 0.2), "first 0.6 and last 0.2"),
        ((100, 2, 0.6, 1.0), "first 0.6 and last 1.0"),
        ((100, 2, 0.6, math.nan), "first 0.6 and last nan"),
        ((5, 5, 0.2, 0.6), "cannot be moved 5 times from 0.2 to 0.6 of a training of 5 steps: lower events"),
        ((1, 1, 0.2, 0.6), "cannot be moved 1 times .* of 1 steps"),
    ],
)
def test_times_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        allocation_steps(*arguments)
