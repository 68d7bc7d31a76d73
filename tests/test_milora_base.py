from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rankwise as rw
import tiny
from rankwise.directions.basehash import base_hashes, check_base, weight_hash
from rankwise.errors import UserError
from rankwise.run import load_stage, save_stage

WEIGHTS = "adapter_model.safetensors"


def saved(folder: Path, base: nn.Module | None = None, **settings) -> Path:
    tiny.train(tiny.milora(base or tiny.make("llama"), **settings)).save_pretrained(folder)
    return folder


def test_a_hash_is_of_dtype_shape_and_bytes():
    weight = torch.arange(12.0).reshape(3, 4)
    dtype, _, digest = weight_hash(weight).partition(":")
    assert (dtype, len(digest)) == ("float32", 32)
    others = [weight.reshape(4, 3), weight + 1e-6, weight.bfloat16(), -weight * -1 + 0.0, weight.T.contiguous().T]
    same = [weight_hash(other) == weight_hash(weight) for other in others]
    assert same == [False, False, False, True, True]
    assert weight_hash(weight.bfloat16()).startswith("bfloat16:")
    assert weight_hash(torch.empty(3, 4, device="meta")) is None


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
    with pytest.warns(UserWarning, match="6 of 6 base weights have another dtype"):
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


def test_another_solvers_rounding_is_no_other_base(tmp_path):
    saved(tmp_path)
    live = tiny.milora(tiny.make("llama"))
    for layer in tiny.layers(live).values():
        layer.lora_start["default"].A.mul_(1 + 1e-4)
    load(live, tmp_path)
    tiny.assert_same_adapter(tiny.resume(tiny.make("llama"), tmp_path), live)


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
        ('{"format": 1, "config": {"r"', "is damaged"),
        ("", "is damaged"),
        ("[1, 2]", "has the format None, where 1 is known"),
        ('{"format": 2, "config": {}, "base": {}}', "has the format 2, where 1 is known: update rankwise"),
        ('{"format": 1, "config": {}}', "needs an object 'config' and an object 'base'"),
        ('{"format": 1, "config": {"rank": 3}, "base": {}}', r"settings not known here \(rank\)"),
        ('{"format": 1, "config": {"lora_alpha": 0}, "base": {}}', r"damaged.*must be above 0"),
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
