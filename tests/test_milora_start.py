"""Where an adapter starts, which modules and weights it cannot start on, and what is left when it is refused."""

from __future__ import annotations

import copy

import numpy as np
import peft
import pytest
import torch
from torch import nn

import rankwise as rw
from rankwise.directions.start import spectral_start
from rankwise.errors import UserError
from tiny_modules import One, adapt, make, train


class Mixed(nn.Module):
    """Modules that can be adapted, followed by one that cannot."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.last = last


def grouped() -> nn.Module:
    return nn.Conv2d(4, 4, 2, groups=2)


def broken() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight.data[0, 0] = float("nan")
    return layer


REFUSED = {
    "groups": (grouped, r"cannot adapt last \(Conv2d\): a convolution of 2 groups"),
    "dilation": (lambda: nn.Conv1d(4, 4, 2, dilation=2), r"cannot adapt last \(Conv1d\): .*dilated"),
    "padding": (lambda: nn.Conv1d(4, 4, 2, padding_mode="circular"), r"cannot adapt last \(Conv1d\): .*circular"),
    "attention": (lambda: nn.MultiheadAttention(4, 2), r"cannot adapt last \(MultiheadAttention\): it keeps three"),
    "max_norm": (lambda: nn.Embedding(9, 4, max_norm=1.0), r"cannot adapt last \(Embedding\): its max_norm"),
    "broken": (broken, r"last: a weight of shape \(4, 4\) holds NaN"),
    "rank": (lambda: nn.Linear(4, 2), r"last: rank 3 of a weight of shape \(2, 4\)"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_a_module_that_is_refused_is_named_and_the_model_left_as_it_was(case):
    last, message = REFUSED[case]
    model = Mixed(last())
    before = {name: (module, copy.deepcopy(module.state_dict())) for name, module in model.named_modules()}
    config = rw.MiloraConfig(r=3, target_modules=["first", "last"], modules_to_save=["head"])
    with pytest.raises(UserError, match=message):
        peft.get_peft_model(model, config)
    assert dict(model.named_modules()).keys() == before.keys()
    assert all(module is before[name][0] for name, module in model.named_modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_adapter_that_is_refused_leaves_the_others():
    model = peft.get_peft_model(Mixed(broken()), rw.MiloraConfig(r=3, target_modules=["first"]))
    with pytest.raises(UserError, match="last: a weight"):
        model.add_adapter("second", rw.MiloraConfig(r=2, target_modules=["first", "last"]))
    assert list(model.peft_config) == ["default"]
    assert isinstance(model.get_base_model().last, nn.Linear)
    assert set(model.get_base_model().first.r) == {"default"}
    model.add_adapter("second", rw.MiloraConfig(r=2, target_modules=["first"]))


def test_the_projection_of_an_attention_is_refused():
    """torch's attention reads its weight, so that an adapter there would have no effect."""
    with pytest.raises(UserError, match=r"cannot adapt last\.out_proj.*would have no effect"):
        peft.get_peft_model(Mixed(nn.MultiheadAttention(4, 2)), rw.MiloraConfig(r=2, target_modules=["last.out_proj"]))


def test_a_target_that_matches_nothing_is_an_error():
    with pytest.raises(UserError, match=r"target_modules 'nowhere' matches no module"):
        adapt("linear", target_modules=["nowhere"])
    with pytest.raises(UserError, match=r"nowhere.*not found in the base model"):
        adapt("linear", target_modules="nowhere")


def test_a_meta_base_has_no_start():
    with torch.device("meta"):
        base = One(nn.Linear(4, 4))
    with pytest.raises(UserError, match=r"only: its weight is on the meta device.*rankwise init"):
        peft.get_peft_model(base, rw.MiloraConfig(r=2, target_modules=["only"]))
    model = peft.get_peft_model(base, rw.MiloraConfig(r=2, target_modules=["only"], init_lora_weights=False))
    assert model.get_base_model().only.lora_start["default"].A.is_meta


class Unpacked(nn.Linear):
    """A weight of 8 bit codes that knows how to unpack itself, as HQQ's layers do."""

    def __init__(self, known: bool = True) -> None:
        super().__init__(6, 5)
        self.scale = 0.02
        codes = torch.randint(-128, 127, (5, 6), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
        self.weight = nn.Parameter(codes, requires_grad=False)
        if known:
            self.W_q = self.weight

    def dequantize(self) -> torch.Tensor:
        return self.weight.float() * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.dequantize(), self.bias)


def test_a_packed_weight_is_unpacked_for_its_start_only():
    base, x = One(Unpacked()).eval(), torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    expected, codes = base(x), base.only.weight.clone()
    dense = base.only.dequantize().double().numpy()
    model = peft.get_peft_model(base, rw.MiloraConfig(r=2, target_modules=["only"]))
    pair = model.get_base_model().only.lora_start["default"]
    u, s, vh = np.linalg.svd(dense, full_matrices=False)
    np.testing.assert_allclose(pair.B.double() @ pair.A.double(), (u[:, -2:] * s[-2:]) @ vh[-2:], atol=1e-5)
    assert torch.equal(model(x), expected)
    train(model, x)
    assert not torch.equal(model(x), expected)
    assert torch.equal(model.get_base_model().only.get_base_layer().weight, codes)


def test_a_packed_weight_that_cannot_be_unpacked_is_named():
    with pytest.raises(UserError, match=r"only: its weight \(Unpacked\) cannot be unpacked.*rankwise init"):
        peft.get_peft_model(One(Unpacked(known=False)), rw.MiloraConfig(r=2, target_modules=["only"]))
    config = rw.MiloraConfig(r=2, target_modules=["only"], init_lora_weights=False)
    assert peft.get_peft_model(One(Unpacked(known=False)), config).get_base_model().only.r == {"default": 2}


@pytest.mark.parametrize("left", [0, 2])
@pytest.mark.parametrize("part", ["minor", "principal"])
def test_directions_without_a_singular_value(part, left):
    """A weight of rank 0 or 2: A0 = v / sqrt(3) and B0 = 0 where s is zero, and both can be trained."""
    base, x = make("linear")
    u, s, vh = torch.linalg.svd(base.only.weight.detach().double(), full_matrices=False)
    base.only.weight.data = ((u[:, :left] * s[:left]) @ vh[:left]).float()
    base.other.weight.data.zero_()
    expected, zero = base(x), {"minor": 4, "principal": 4 - left}[part]
    with pytest.warns(UserWarning, match=rf"{zero + 1} directions in 2 modules have a singular value that is zero"):
        model = peft.get_peft_model(
            base, rw.MiloraConfig(r=4, part=part, target_modules=["only", "other"], rank_pattern={"other": 1})
        ).eval()
    pair = model.get_base_model().only.lora_start["default"]
    dead = (pair.B == 0).all(dim=0)
    assert int(dead.sum()) == zero
    torch.testing.assert_close(pair.A[dead].norm(dim=1), torch.full((zero,), 3**-0.5))
    torch.testing.assert_close(pair.A[dead] @ pair.A[dead].T, torch.eye(zero) / 3, atol=1e-6, rtol=1e-6)
    assert torch.equal(model(x), expected)
    train(model, x)
    layer = model.get_base_model().only
    assert (layer.lora_B["default"].weight[:, dead] != 0).all()
    assert ((layer.lora_A["default"].weight - pair.A)[dead] != 0).any()


def test_a_weight_with_all_its_singular_values_is_no_cause_for_a_warning(recwarn):
    adapt("linear", r=6)
    assert not [w for w in recwarn if "singular value" in str(w.message)]


def test_without_a_start_a_and_b_stay_as_they_are():
    model, x = adapt("linear", init_lora_weights=False)
    layer = model.get_base_model().only
    assert torch.equal(layer.lora_A["default"].weight, layer.lora_start["default"].A)
    assert torch.equal(layer.lora_B["default"].weight, layer.lora_start["default"].B)
    base, _ = make("linear")
    assert torch.equal(model(x), base(x))


def test_a_second_adapter_of_the_same_start_copies_it(monkeypatch):
    """As a preference trainer makes its reference: an adapter of the same config, then a copy of the parameters."""
    model, x = adapt("linear")
    train(model, x)
    expected = model(x)

    def refuse(*_: object) -> None:
        raise AssertionError("decomposed again")

    monkeypatch.setattr("rankwise.directions.start.triplets", refuse)
    model.add_adapter("ref", model.peft_config["default"])
    own = {name: parameter.data for name, parameter in model.named_parameters() if ".default" in name}
    for name, value in own.items():
        model.get_parameter(name.replace(".default", ".ref")).data.copy_(value)
    model.set_adapter("ref")
    assert torch.equal(model(x), expected)
    with pytest.raises(AssertionError, match="decomposed again"):
        model.add_adapter("third", rw.MiloraConfig(r=3, part="principal", target_modules=["only"]))


@pytest.mark.parametrize("config", [rw.MiloraConfig, rw.SoraConfig])
@pytest.mark.parametrize("kind", ["linear", "embedding", "conv1d"])
def test_a_second_adapter_of_the_same_config_object_is_a_copy(kind, config):
    """Trained values and all: a trainer leaves out what has the adapter's name at the end of its own."""
    model, x = adapt(kind, config, **{"use_dora": True} if (kind, config) == ("linear", rw.MiloraConfig) else {})
    train(model, x)
    expected = model(x)
    with pytest.warns(UserWarning, match="'ref' was given the config object of 'default' itself and is made as its"):
        model.add_adapter("ref", model.peft_config["default"])
    model.set_adapter("ref")
    assert torch.equal(model(x), expected)
    train(model, x, 1)
    assert not torch.equal(model(x), expected)
    model.set_adapter("default")
    assert torch.equal(model(x), expected)
    model.add_adapter("fresh", copy.copy(model.peft_config["default"]))
    model.set_adapter("fresh")
    assert torch.equal(model(x), make(kind)[0](x))


@pytest.mark.parametrize("loaded", [False, True])
def test_what_is_left_of_a_pruned_start_is_no_start_for_others(tmp_path, loaded):
    """As many directions as are asked for, but not those of the smallest singular values."""
    model, _ = adapt("linear", rw.SoraConfig, r=4, part="minor", gate_init="ones")
    model.get_base_model().only.lora_gate["default"].data[:2] = 0
    rw.prune(model)
    if loaded:
        model.save_pretrained(tmp_path)
        model = peft.PeftModel.from_pretrained(make("linear")[0], tmp_path)
    model.add_adapter("second", rw.SoraConfig(r=2, part="minor", target_modules=["only"], gate_init="ones"))
    expected, _ = adapt("linear", rw.SoraConfig, r=2, part="minor", gate_init="ones")
    pair, own = (one.get_base_model().only.lora_start for one in (model, expected))
    assert not torch.allclose(pair["default"].B @ pair["default"].A, own["default"].B @ own["default"].A)
    torch.testing.assert_close(pair["second"].B @ pair["second"].A, own["default"].B @ own["default"].A)


def test_an_alpha_of_its_own_is_a_start_of_its_own():
    model, _ = adapt("linear", lora_alpha=3)
    model.add_adapter("second", rw.MiloraConfig(r=3, lora_alpha=12, target_modules=["only"]))
    layer = model.get_base_model().only
    assert [layer.scaling[name] for name in ("default", "second")] == [1, 4]
    u, s, vh = np.linalg.svd(layer.get_base_layer().weight.detach().double().numpy())
    for name, pair in layer.lora_start.items():
        product = layer.scaling[name] * (pair.B.double() @ pair.A.double())
        np.testing.assert_allclose(product, (u[:, 3:] * s[3:]) @ vh[3:6], atol=1e-5)


def refuse_to_decompose(*_: object) -> None:
    raise AssertionError("decomposed")


@pytest.mark.parametrize("config", [rw.MiloraConfig, rw.SoraConfig])
def test_every_rank_is_checked_before_anything_is_decomposed(monkeypatch, config):
    monkeypatch.setattr("rankwise.directions.start.triplets", refuse_to_decompose)
    settings = {"r": 3, "part": "minor", "target_modules": ["first", "last"]}
    with pytest.raises(UserError, match=r"last: rank 3 of a weight of shape \(2, 4\): 1 to its smaller side"):
        peft.get_peft_model(Mixed(nn.Linear(4, 2)), config(**settings))
    with pytest.raises(AssertionError, match="decomposed"):
        peft.get_peft_model(Mixed(nn.Linear(4, 2)), config(**settings, rank_pattern={"last": 2}))
    peft.get_peft_model(Mixed(nn.Linear(4, 2)), config(**settings, init_lora_weights=False))


@pytest.mark.parametrize("device", ["meta", "nowhere", "cuda:99"])
def test_a_device_that_cannot_decompose_is_told_of_first(monkeypatch, device):
    monkeypatch.setattr("rankwise.directions.start.triplets", refuse_to_decompose)
    with pytest.raises(UserError, match=f"^start_device '{device}'"):
        adapt("linear", start_device=device)


@pytest.mark.parametrize("scaling", [0.0, -1.0, float("nan")])
def test_a_scaling_that_has_no_start_is_refused(scaling):
    with pytest.raises(UserError, match=f"a scaling of {scaling} has no start"):
        spectral_start(torch.eye(3), 1, "minor", scaling=scaling)


def test_a_sum_is_no_start_for_others():
    """An adapter that looks the same but was computed otherwise is not copied."""
    model, _ = adapt("linear")
    model.add_weighted_adapter(["default"], [1.0], "sum")
    model.delete_adapter("default")
    model.add_adapter("fresh", rw.MiloraConfig(r=3, target_modules=["only"]))
    layer = model.get_base_model().only
    assert layer.lora_start["sum"].A.abs().max() == 0 and layer.lora_start["fresh"].A.abs().max() > 0
    model.add_adapter("ref", model.peft_config["sum"])
    assert layer.lora_start["ref"].A.abs().max() == 0
