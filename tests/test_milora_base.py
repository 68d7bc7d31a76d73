from __future__ import annotations

import copy
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rankwise as rw
import tiny
from rankwise.directions import basehash
from rankwise.directions.basehash import base_hash, base_hashes, check_base, weight_hash
from rankwise.errors import UserError
from rankwise.methods import load_stage, save_stage

WEIGHTS = "adapter_model.safetensors"


def saved(folder: Path, base: nn.Module | None = None, **settings) -> Path:
    tiny.train(tiny.milora(base or tiny.make("llama"), **settings)).save_pretrained(folder)
    return folder


def test_a_hash_is_of_shape_and_values(monkeypatch):
    weight = torch.arange(12.0).reshape(3, 4)
    dtype, _, digest = weight_hash(weight).partition(":")
    assert (dtype, len(digest)) == ("float32", 32)
    others = [weight.reshape(4, 3), weight + 1e-6, weight.double(), -weight * -1 + 0.0, weight.T.contiguous().T]
    same = [weight_hash(other) == weight_hash(weight) for other in others]
    assert same == [False, False, False, True, True]
    assert weight_hash(torch.empty(3, 4, device="meta")) is None
    monkeypatch.setattr(basehash, "CHUNK", 5)
    assert weight_hash(weight) == f"float32:{digest}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_weight_that_was_widened_has_the_same_hash(dtype):
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    narrow = weight.to(dtype)
    kind, _, digest = weight_hash(narrow).partition(":")
    assert kind == str(dtype).removeprefix("torch.")
    assert weight_hash(narrow.float()) == f"float32:{digest}"
    assert weight_hash(weight) != f"float32:{digest}"


@pytest.mark.parametrize(("before", "after"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_bfloat16_base_is_known_in_float32_and_a_changed_one_refused(tmp_path, before, after):
    rounded = tiny.make("llama", torch.bfloat16)
    saved(tmp_path, copy.deepcopy(rounded).to(before))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tiny.resume(copy.deepcopy(rounded).to(after), tmp_path)
    changed = copy.deepcopy(rounded).to(before)
    changed.model.layers[1].mlp.down_proj.weight.data[0, 0] += 1
    with pytest.raises(UserError, match=r"down_proj: the base weight is not the one .* \(1 of 6 weights differ\)"):
        tiny.resume(changed, tmp_path)


def test_a_weight_spread_over_processes_has_no_hash():
    assert base_hash(nn.Module()) is None
    layer = nn.Linear(2, 2)
    assert base_hash(layer) == weight_hash(layer.weight)
    layer.weight = nn.Parameter(Spread(torch.ones(2, 2)))
    assert base_hash(layer) is None


class Spread(torch.Tensor):
    """A tensor type of torch's own, as DTensor: its parts are not the weight."""

    __module__ = "torch.distributed.tensor"

    @staticmethod
    def __new__(cls, tensor):
        return torch.Tensor._make_wrapper_subclass(cls, tensor.shape, dtype=tensor.dtype)

    def __init__(self, tensor):
        self.part = tensor

    def __tensor_flatten__(self):
        return ["part"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return cls(function(*(one.part if isinstance(one, cls) else one for one in args), **(kwargs or {})))


def test_a_changed_base_is_refused_and_left_as_it_was(tmp_path):
    saved(tmp_path)
    base = tiny.make("llama")
    base.model.layers[1].mlp.down_proj.weight.data[0, 0] += 1e-3
    base.model.layers[0].self_attn.q_proj.weight.data[0, 0] += 1e-3
    expected = tiny.logits(base)
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_proj: the base weight .* \(2 of 6 weights differ\)"):
        tiny.resume(base, tmp_path)
    assert not tiny.layers(base) and torch.equal(tiny.logits(base), expected)


def test_a_base_of_another_dtype_is_said_not_to_be_comparable(tmp_path):
    saved(tmp_path)
    with pytest.warns(UserWarning, match="6 of 6 base weights have another dtype or packing"):
        tiny.resume(tiny.make("llama", torch.bfloat16), tmp_path)


def test_a_base_without_the_module_is_refused(tmp_path):
    saved(tmp_path)
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_proj is adapted in the checkpoint"):
        tiny.resume(tiny.make("bert"), tmp_path)


def test_hashes_of_an_adapted_model_are_those_of_its_base():
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    expected = base_hashes(tiny.make("llama"), names)
    assert base_hashes(tiny.milora(tiny.make("llama")).get_base_model(), names) == expected
    check_base(expected, expected)


def load(model: peft.PeftModel, folder: Path) -> None:
    """As a trainer does when it resumes: into the adapter that is there, without its config."""
    model.load_adapter(folder, "default", is_trainable=True)


def test_loads_into_a_live_adapter(tmp_path):
    model = tiny.train(tiny.milora(tiny.make("llama")))
    model.save_pretrained(tmp_path)
    live = tiny.milora(tiny.make("llama"))
    load(live, tmp_path)
    tiny.assert_same_adapter(model, live)
    load(live, tmp_path)
    tiny.assert_same_adapter(model, live)


@pytest.mark.parametrize("change", ["base", "part"])
def test_a_live_adapter_refuses_a_checkpoint_with_another_start(tmp_path, change):
    saved(tmp_path)
    base = tiny.make("llama")
    if change == "base":
        weight = base.model.layers[1].mlp.down_proj.weight.data
        weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    live = tiny.milora(base, part="principal" if change == "part" else "minor")
    before = copy.deepcopy(live)
    named = "model.layers.0.self_attn.q_proj" if change == "part" else "model.layers.1.mlp.down_proj"
    with pytest.raises(UserError, match=f"{named}: the checkpoint was begun on another base"):
        load(live, tmp_path)
    tiny.assert_same_adapter(before, live)


@pytest.mark.parametrize("cause", ["alpha", "rslora", "base"])
def test_another_scaling_is_told_from_another_base(tmp_path, cause):
    """s B0 A0 is the same part of the weight, so that twice the scaling is half of B0 A0: 4 and sqrt(4) for rank 4."""
    saved(tmp_path)
    base = tiny.make("llama")
    if cause == "base":
        for parameter in base.parameters():
            parameter.data *= 2
    live = tiny.milora(base, **{"alpha": {"lora_alpha": 2}, "rslora": {"use_rslora": True}, "base": {}}[cause])
    expected = {"alpha": "0.5", "rslora": "2", "base": "0.5"}[cause]
    with pytest.raises(
        UserError, match=rf"start is {expected} times the one .* lora_alpha .*or on a base so many times"
    ):
        load(live, tmp_path)


def test_another_solvers_rounding_is_no_other_base(tmp_path):
    saved(tmp_path)
    live = tiny.milora(tiny.make("llama"))
    for layer in list(tiny.layers(live).values())[1:]:
        layer.lora_start["default"].A.mul_(1 + 1e-4)
    with pytest.warns(UserWarning, match="^5 of 6 starts of the checkpoint are not to the bit") as told:
        load(live, tmp_path)
    assert len(told) == 1
    tiny.assert_same_adapter(tiny.resume(tiny.make("llama"), tmp_path), live)


def test_a_base_that_changed_outside_the_part_is_said(tmp_path):
    """Its largest singular values are three times as large, and the minor ones as they were."""
    saved(tmp_path)
    base = tiny.make("llama")
    for name in tiny.layers(tiny.milora(tiny.make("llama"))):
        weight = base.get_submodule(name).weight
        u, s, vh = torch.linalg.svd(weight.data.double(), full_matrices=False)
        s[:2] *= 3
        weight.data = ((u * s) @ vh).float()
    with pytest.warns(UserWarning, match="6 of 6 starts .* or the base changed outside this part"):
        load(tiny.milora(base), tmp_path)


def test_the_same_start_is_loaded_without_a_word(tmp_path):
    saved(tmp_path, use_dora=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load(tiny.milora(tiny.make("llama"), use_dora=True), tmp_path)


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


DOWN = "base_model.model.model.layers.1.mlp.down_proj.lora_"


def without_one(tensors):
    del tensors[f"{DOWN}A.weight"]


def without_start(tensors):
    for name in tensors:
        tensors[name] = (tensors[name][:4] if "lora_A" in name else tensors[name][:, :4]).contiguous()


def with_another(tensors):
    tensors["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"] = torch.zeros(8, 16)


def of_another_width(tensors):
    tensors[f"{DOWN}A.weight"] = torch.zeros(8, 25)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_one, r"layers\.1\.mlp\.down_proj: the checkpoint lacks its LoRA matrices: save"),
        (without_start, r"lora_A\.weight of the checkpoint has the shape \(4, .*start below A"),
        (with_another, r"layers\.1\.mlp\.up_proj: the checkpoint adapts it, this adapter does not"),
        (of_another_width, r"down_proj\.lora_A\.weight of the checkpoint has the shape \(8, 25\), where \(8, 24\)"),
    ],
    ids=["missing", "without the start", "more", "another width"],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, message):
    rewrite(saved(tmp_path), change)
    with pytest.raises(UserError, match=message):
        tiny.resume(tiny.make("llama"), tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 1, "config": {"r"', "is not JSON"),
        ("", "is not JSON"),
        ("[1, 2]", "holds no JSON object"),
        ('{"format": 2, "config": {}, "base": {}}', "has the format 2, where 1 is known: update rankwise"),
        ('{"format": 1, "config": {}}', "needs an object 'config' and an object 'base'"),
        ('{"format": 1, "config": {"rank": 3}, "base": {}}', r"settings not known here \(rank\)"),
        ('{"format": 1, "config": {"lora_alpha": 0}, "base": {}}', r"damaged.*must be .*above 0"),
    ],
    ids=["half", "empty", "no object", "another format", "no base", "unknown field", "impossible alpha"],
)
def test_a_damaged_side_file_is_named(tmp_path, text, message):
    (saved(tmp_path) / "milora.json").write_text(text)
    with pytest.raises(UserError, match=rf"milora\.json.*{message}"):
        rw.MiloraConfig.from_pretrained(tmp_path)


def test_a_folder_of_plain_lora_has_no_side_file(tmp_path):
    tiny.adapted("llama").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"milora\.json does not exist.*load it as plain LoRA"):
        rw.MiloraConfig.from_pretrained(tmp_path)


def test_a_subfolder_is_found(tmp_path):
    saved(tmp_path / "second", part="principal")
    assert rw.MiloraConfig.from_pretrained(tmp_path, subfolder="second").part == "principal"


def test_a_runs_stage_is_loaded_on_its_own_base_only(tmp_path):
    model = tiny.train(tiny.milora(tiny.make("llama")))
    save_stage(model, tmp_path / "stage")
    again = tiny.milora(tiny.make("llama"))
    load_stage(again, tmp_path / "stage")
    tiny.assert_same_adapter(model, again)
    other = tiny.make("llama")
    other.model.layers[1].mlp.down_proj.weight.data[0, 0] += 1e-4
    with pytest.raises(UserError, match=r"down_proj: the base weight is not the one.* \(1 of 6 weights differ\)"):
        load_stage(tiny.milora(other), tmp_path / "stage")


def test_pefts_conversion_of_a_changed_base_is_refused(tmp_path):
    model = tiny.milora(tiny.make("llama"))
    with pytest.raises(UserError, match="plain LoRA on the original base already"):
        model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
