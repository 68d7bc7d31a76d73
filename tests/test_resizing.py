from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import Adafactor

import rankwise as rw
import tiny
import tiny_modules
from rankwise.errors import UserError
from rankwise.peft_bridge.matrices import factor_matrices, factor_parameters
from rankwise.ranks import gates, resize_adapter

CONFIGS = {"lora": peft.LoraConfig, "sora": rw.SoraConfig}


def one(kind: str, config: type[peft.LoraConfig] = peft.LoraConfig) -> tuple[peft.PeftModel, Tensor]:
    """A trained adapter of rank 3 on a single module; scaling 5 / 3."""
    torch.manual_seed(1)
    model, x = tiny_modules.adapt(kind, config, lora_alpha=5)
    return tiny_modules.train(model, x), x


def adam(model: nn.Module, x: Tensor, steps: int = 3, **settings) -> torch.optim.AdamW:
    """An optimizer that has taken a few steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, **settings)
    descend(model, x, optimizer, steps)
    return optimizer


def descend(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer, steps: int) -> float:
    for _ in range(steps):
        optimizer.zero_grad()
        value = (model(x) - 1).square().mean()
        value.backward()
        optimizer.step()
    return float(value.detach())


def layer_of(model: peft.PeftModel) -> nn.Module:
    return model.get_base_model().only


def mask(*kept: int, of: int = 3) -> Tensor:
    found = torch.zeros(of, dtype=torch.bool)
    found[list(kept)] = True
    return found


# The function


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("kind", tiny_modules.KINDS)
def test_growing_leaves_the_function_as_it_is(kind, config):
    model, x = one(kind, config)
    expected = model(x)
    assert not torch.allclose(expected, tiny_modules.make(kind)[0](x), atol=1e-3)
    assert resize_adapter(model, {}, {"only": 2}) == ()
    layer = layer_of(model)
    b, a = factor_matrices(layer, "default")
    assert (b.shape[1], a.shape[0], layer.r["default"]) == (5, 5, 5)
    assert layer.scaling["default"] == 5 / 3
    torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", tiny_modules.KINDS)
def test_a_new_direction_is_as_lora_starts_it(kind):
    """Beside PEFT's own start of a wide adapter: B zero and A uniform, or the other way round for an embedding."""
    model, _ = one(kind)
    torch.manual_seed(2)
    resize_adapter(model, {}, {"only": 500})
    torch.manual_seed(3)
    fresh, _ = tiny_modules.adapt(kind, peft.LoraConfig, r=500)
    for found, expected in zip(
        factor_matrices(layer_of(model), "default"), factor_matrices(layer_of(fresh), "default"), strict=True
    ):
        new = found[:, 3:] if found.shape[1] == 503 else found[3:]
        assert new.shape == expected.shape
        assert bool(new.any()) == bool(expected.any())
        torch.testing.assert_close(new.std(), expected.std(), atol=0, rtol=0.1)
        torch.testing.assert_close(new.abs().max(), expected.abs().max(), atol=0, rtol=0.3)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("kind", tiny_modules.KINDS)
def test_cutting_takes_out_the_direction(kind, config):
    """In float64 by hand: the base's weight with the sum of the kept directions."""
    model, x = one(kind, config)
    layer = layer_of(model)
    b, a = (factor.detach().double().numpy() for factor in factor_matrices(layer, "default"))
    gate = gates(model)["only"].detach().double().numpy() if config is rw.SoraConfig else [1.0, 1.0, 1.0]
    update = 5 / 3 * (gate[0] * b[:, [0]] @ a[[0]] + gate[2] * b[:, [2]] @ a[[2]])
    resize_adapter(model, {"only": mask(0, 2)}, {"only": 4})
    assert layer.r["default"] == 6
    expected = tiny_modules.with_weight(kind, update, x).float()
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


# The optimizer


@pytest.mark.parametrize("kind", tiny_modules.KINDS)
def test_the_state_of_what_stays_is_kept_to_the_bit(kind):
    model, x = one(kind)
    optimizer = adam(model, x, amsgrad=True)
    a, b = factor_parameters(layer_of(model), "default")
    before = [{key: value.clone() for key, value in optimizer.state[p].items()} for p in (a, b)]
    resize_adapter(model, {"only": mask(0, 2)}, {"only": 3}, optimizer)
    assert all(p is q for p, q in zip(factor_parameters(layer_of(model), "default"), (a, b), strict=True))
    for parameter, axis, old in ((a, 0, before[0]), (b, 1, before[1])):
        state = optimizer.state[parameter]
        assert state.keys() == old.keys() == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
        assert state["step"] == old["step"] == 3
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            kept, new = state[key].split([2, 3], dim=axis)
            assert torch.equal(kept, old[key].index_select(axis, torch.tensor([0, 2])))
            assert old[key].any() and not new.any() and state[key].shape == parameter.shape


@pytest.mark.parametrize("kind", tiny_modules.KINDS)
def test_training_goes_on(kind):
    """New directions are trained, with the old ones, by the optimizer that was there before."""
    model, x = one(kind)
    optimizer = adam(model, x)
    resize_adapter(model, {"only": mask(1, 2)}, {"only": 2}, optimizer)
    before = [factor.detach().clone() for factor in factor_matrices(layer_of(model), "default")]
    first = descend(model, x, optimizer, 1)
    assert descend(model, x, optimizer, 20) < first
    for old, new in zip(before, factor_matrices(layer_of(model), "default"), strict=True):
        changed = (old != new).any(dim=0) if old.shape[1] == 4 else (old != new).any(dim=1)
        assert changed.all()


def test_steps_after_growing_are_those_of_the_larger_model():
    """Against Adam written out by hand, whose moments of the new direction begin at zero at the fourth step."""
    model, x = one("linear")
    optimizer = adam(model, x, weight_decay=0.0)
    _, b = factor_parameters(layer_of(model), "default")
    resize_adapter(model, {}, {"only": 1}, optimizer)
    state = {key: optimizer.state[b][key].double().clone() for key in ("exp_avg", "exp_avg_sq")}
    value = b.detach().double().clone()
    for step in (4, 5):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        gradient = b.grad.double()
        optimizer.step()
        state["exp_avg"] = 0.9 * state["exp_avg"] + 0.1 * gradient
        state["exp_avg_sq"] = 0.999 * state["exp_avg_sq"] + 0.001 * gradient**2
        root = (state["exp_avg_sq"] / (1 - 0.999**step)).sqrt()
        value -= 1e-2 * state["exp_avg"] / (1 - 0.9**step) / (root + 1e-8)
    torch.testing.assert_close(b.detach().double(), value, atol=1e-6, rtol=0)
    assert value[:, 3].abs().min() > 0.01  # larger than the learning rate


def test_a_loss_that_is_still_held_does_no_harm():
    model, x = one("linear")
    optimizer = adam(model, x)
    held = model(x).sum()
    held.backward()
    resize_adapter(model, {}, {"only": 1}, optimizer)
    assert factor_parameters(layer_of(model), "default")[0].grad is None
    descend(model, x, optimizer, 2)
    assert held.isfinite()


def test_plain_descent_keeps_no_state():
    model, x = one("linear")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    resize_adapter(model, {"only": mask(0)}, {"only": 1}, optimizer)
    assert descend(model, x, optimizer, 10) < descend(model, x, optimizer, 1) + 1


# Several layers


def moved(family: str = "llama", optimizer: torch.optim.Optimizer | None = None, **settings) -> peft.PeftModel:
    """The first layer loses all, the second one of four, the third and the last get three and two."""
    model = tiny.adapted(family, **settings)
    names = list(tiny.layers(model))
    kept = {names[0]: mask(of=4), names[1]: mask(0, 1, 3, of=4)}
    assert resize_adapter(model, kept, {names[2]: 3, names[-1]: 2}, optimizer) == (names[0],)
    ranks = {name: layer.r["default"] for name, layer in tiny.layers(model).items()}
    expected = dict.fromkeys(names, 4) | {names[1]: 3, names[2]: 7, names[-1]: 6}
    assert ranks == {name: rank for name, rank in expected.items() if name != names[0]}
    return model


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", tiny.TARGETS)
def test_other_ranks_save_and_load_in_peft(tmp_path, family, rslora):
    model = tiny.train(moved(family, use_rslora=rslora))
    expected = tiny.logits(model)
    model.save_pretrained(tmp_path)
    config = peft.LoraConfig.from_pretrained(tmp_path)
    assert type(config) is peft.LoraConfig and len(config.rank_pattern) == len(tiny.layers(model))
    loaded = peft.PeftModel.from_pretrained(tiny.make(family), tmp_path)
    torch.testing.assert_close(tiny.logits(loaded), expected, atol=1e-6, rtol=1e-6)
    for name, layer in tiny.layers(loaded).items():
        assert layer.scaling["default"] == pytest.approx(6 / 4**0.5 if rslora else 6 / 4, rel=1e-12)
        assert layer.r == tiny.layers(model)[name].r


SCRIPT = """
import sys, torch, peft
from transformers import AutoModelForCausalLM
from safetensors.torch import save_file
model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])
with torch.no_grad():
    save_file({"logits": model(input_ids=torch.tensor([[1, 5, 9, 2, 30, 7, 7, 12]])).logits}, sys.argv[3])
assert "rankwise" not in sys.modules
"""


def test_it_loads_where_rankwise_is_not(tmp_path):
    from safetensors.torch import load_file

    model = moved()
    tiny.make("llama").save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    places = [str(tmp_path / name) for name in ("base", "adapter", "logits")]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *places], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = load_file(Path(places[2]))["logits"]
    torch.testing.assert_close(found, tiny.logits(model)[:1], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", tiny_modules.KINDS)
def test_each_kind_of_module_saves_and_loads(tmp_path, kind):
    model, x = one(kind)
    resize_adapter(model, {"only": mask(0, 2)}, {"only": 3})
    tiny_modules.train(model, x)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_modules.make(kind)[0], tmp_path)
    assert layer_of(loaded).r["default"] == 5
    torch.testing.assert_close(loaded(x), model(x), atol=1e-6, rtol=1e-6)


def test_parameters_of_a_removed_adapter_leave_the_optimizer():
    model = tiny.adapted("llama")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tiny.train(model, 2, optimizer)
    names = list(tiny.layers(model))
    resize_adapter(model, {names[0]: mask(of=4)}, {names[1]: 4}, optimizer)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in trained}
    assert set(optimizer.state) == set(trained) and len(trained) == 10
    tiny.train(model, 2, optimizer)


def test_a_state_that_cannot_be_cut_goes_with_its_parameter():
    model = tiny.adapted("llama")
    optimizer = Adafactor([p for p in model.parameters() if p.requires_grad])
    tiny.train(model, 2, optimizer)
    name = next(iter(tiny.layers(model)))
    assert resize_adapter(model, {name: mask(of=4)}, {}, optimizer) == (name,)
    assert len(optimizer.state) == 10
    tiny.train(model, 2, optimizer)


def test_merging_and_exporting_go_on(tmp_path):
    model = moved()
    expected = tiny.logits(model)
    report = rw.export(model, tmp_path / "uniform")
    assert sorted(set(report.ranks.values())) == [3, 4]  # as many as were trained: new ones are still zero
    loaded = peft.PeftModel.from_pretrained(tiny.make("llama"), tmp_path / "uniform")
    torch.testing.assert_close(tiny.logits(loaded), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tiny.logits(model.merge_and_unload()), expected, atol=1e-5, rtol=1e-5)


# Refusals: nothing is changed


def refused(model: peft.PeftModel, message: str, *args, **kwargs) -> None:
    ranks = {name: layer.r["default"] for name, layer in tiny.layers(model).items()}
    values = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        resize_adapter(model, *args, **kwargs)
    assert {name: layer.r["default"] for name, layer in tiny.layers(model).items()} == ranks
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_what_is_not_there_is_refused():
    model, _ = one("linear")
    refused(model, r"layer 'onyl' has no adapter 'default': did you mean 'only'\?", {"onyl": mask(0)})
    refused(model, r"layer 'other' has no adapter 'default': ", {}, {"other": 1})
    refused(model, r"only: 4 values say which directions stay, and there are 3", {"only": mask(0, of=4)})
    refused(model, r"only: -1 directions cannot be added", {}, {"only": -1})
    refused(model, r"every layer would lose its adapter", {"only": mask()})


def test_a_merged_adapter_is_refused():
    model, _ = one("linear")
    model.merge_adapter()
    refused(model, r"only: default is merged into its weight", {}, {"only": 1})


@pytest.mark.parametrize("config", [rw.MiloraConfig, lambda **more: rw.SoraConfig(part="minor", **more)])
def test_a_part_of_the_spectrum_has_no_further_directions(config):
    model, _ = tiny_modules.adapt("linear", config)
    refused(model, r"only: an adapter that starts from a part of the spectrum has no further", {}, {"only": 1})


def test_a_state_of_rows_and_columns_is_refused():
    """This Adafactor keeps vectors of sums over rows and columns: growing alone is refused as well."""
    model, x = one("linear")
    optimizer = Adafactor([p for p in model.parameters() if p.requires_grad])
    descend(model, x, optimizer, 1)
    message = r"only: Adafactor keeps 'exp_avg_sq_row' of shape \(3,\) .* cannot be cut by direction"
    refused(model, message, {}, {"only": 1}, optimizer)
    refused(model, message, {"only": mask(0, 1)}, {}, optimizer)


def test_sums_that_keep_their_axes_are_cut_where_they_count_directions():
    """torch's Adafactor: of A (3, 7) it keeps (3, 1) and (1, 7); with a single direction the two look alike."""
    model, x = one("linear")
    optimizer = torch.optim.Adafactor([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    descend(model, x, optimizer, 1)
    a, b = factor_parameters(layer_of(model), "default")
    resize_adapter(model, {"only": mask(2)}, {"only": 3}, optimizer)
    assert [optimizer.state[a][key].shape for key in ("row_var", "col_var")] == [(4, 1), (1, 7)]
    assert [optimizer.state[b][key].shape for key in ("row_var", "col_var")] == [(6, 1), (1, 4)]
    descend(model, x, optimizer, 2)
    resize_adapter(model, {"only": mask(0, of=4)}, {}, optimizer)
    refused(model, r"only: Adafactor keeps 'row_var' of shape \(1, 1\)", {}, {"only": 1}, optimizer)


def test_a_convolution_of_groups_is_refused():
    torch.manual_seed(0)
    base = tiny_modules.One(nn.Conv1d(4, 6, 3, groups=2))
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["only"]))
    refused(
        model, r"only: its directions cannot be cut or added: a convolution of 2 groups", {"only": mask(0, 1, of=4)}
    )


def test_adalora_is_refused():
    base, _ = tiny_modules.make("linear")
    model = peft.get_peft_model(base, peft.AdaLoraConfig(init_r=3, total_step=9, target_modules=["only"]))
    refused(model, r"only: its directions cannot be cut or added: PEFT's SVDLinear", {"only": mask(0, 1)})
