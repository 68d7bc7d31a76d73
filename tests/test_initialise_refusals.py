from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from rankwise.directions.model_files import ModelFiles
from rankwise.directions.streaming import initialise
from rankwise.errors import UserError
from rankwise.files import new_folder
from tiny_starts import saved, settings

FAMILIES = list(tiny.TARGETS)


@pytest.fixture
def source(tmp_path) -> Path:
    return saved(tmp_path / "source")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def bare(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def without_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.v_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def of_another_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(16, 17)
    save_file(tensors, folder / "model.safetensors")


def not_finite(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.inf
    save_file(tensors, folder / "model.safetensors")


def index_cut_off(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ', encoding="utf-8")


def shard_missing(folder: Path) -> None:
    names = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    keys = load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(keys, "model-00001-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert names["model_type"] == "llama"


def shard_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def config_with(**changes):
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (pickled, "pytorch_model.bin is a pickle.*save_pretrained"),
        (bare, "holds no model.safetensors.*whole model"),
        (cut_off, "model.safetensors is not readable as safetensors"),
        (without_a_weight, r"no weight for model.layers.1.self_attn.v_proj.weight"),
        (of_another_shape, r"q_proj.weight in .*model.safetensors has shape \(16, 17\) where .*\(16, 16\)"),
        (not_finite, "^model.layers.1.mlp.down_proj: .*NaN or infinity"),
        (index_cut_off, "index.json is not JSON"),
        (shard_missing, "model-00001-of-00002.safetensors is not there"),
        (shard_elsewhere, "'../model.safetensors' is no file of this folder"),
        (config_with(architectures=["OakForCausalLM"]), "OakForCausalLM.*transformers has no such model"),
        (config_with(architectures=None), "transformers has no such model"),
        (config_with(architectures=["Trainer"]), "Trainer.*transformers has no such model"),
        (config_with(model_type="oak"), "config.json cannot be loaded"),
        (config_with(quantization_config={"quant_method": "gptq", "bits": 4}), "quantised checkpoint.*before"),
    ],
    ids=[
        "pickle", "no weights", "cut off", "a weight missing", "a shape", "not finite", "index", "shard",
        "shard elsewhere", "architecture", "no architecture", "no model", "model type", "quantised",
    ],
)  # fmt: skip
def test_models_that_are_refused(tmp_path, source, damage, message):
    damage(source)
    with pytest.raises(UserError, match=message):
        initialise(str(source), tmp_path / "start", settings())
    assert not (tmp_path / "start").exists() and not list(tmp_path.glob(".start*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["oak"]}, "oak"),
        ({"r": 9, "target_modules": ["v_proj"]}, r"v_proj: rank 9 .* smaller side is 8"),
        ({"r": 10**15}, f"^r {10**15} is far more than the matrices of the model have: give 16 or less"),
        ({"rank_pattern": {"v_proj": 10**15}}, rf"rank_pattern\.v_proj {10**15} is far more than the"),
        ({"modules_to_save": ["lm_head"]}, "a start holds no .*lm_head"),
        ({"start_device": "oak"}, "start_device 'oak'"),
        ({"init_lora_weights": False}, "init_lora_weights=False asks for no start"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication repeats layers .* use get_peft_model"),
    ],
    ids=[
        "targets",
        "rank",
        "a rank beyond all",
        "a pattern beyond all",
        "modules_to_save",
        "device",
        "no start",
        "layer_replication",
    ],
)
def test_settings_that_are_refused_before_anything_is_read(tmp_path, source, monkeypatch, changes, message):
    monkeypatch.setattr(ModelFiles, "weight", None)
    with pytest.raises(UserError, match=message):
        initialise(str(source), tmp_path / "start", settings(**changes))
    assert not (tmp_path / "start").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_doras_magnitude_is_not_rounded(tmp_path, source, dtype):
    with pytest.raises(UserError, match="would round DoRA's magnitude"):
        initialise(str(source), tmp_path / "start", settings(use_dora=True), dtype=dtype)


@pytest.mark.parametrize("which", ["out", "cache"])
@pytest.mark.parametrize("name", ["file", "file/below"])
def test_places_that_cannot_be_written_to_are_refused_before_anything_is_read(
    tmp_path, source, monkeypatch, which, name
):
    monkeypatch.setattr(ModelFiles, "weight", None)
    (tmp_path / "file").write_text("x")
    place = str(tmp_path / name)
    out, cache = (place, None) if which == "out" else (str(tmp_path / "start"), place)
    with pytest.raises(UserError, match=r"file.* (cannot be written|holds something other)"):
        initialise(str(source), out, settings(cache=cache))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "source"]


def test_folders_that_are_refused(tmp_path, source):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("ten years", encoding="utf-8")
    with pytest.raises(UserError, match="holds something other than an earlier start"):
        initialise(str(source), tmp_path / "notes", settings())
    with new_folder(tmp_path / "trained") as made:  # a checkpoint of MiLoRA has a start's files
        (made / "milora.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="holds something other than an earlier start"):
        initialise(str(source), tmp_path / "trained", settings())
    with pytest.raises(UserError, match=r"target_modules .*: "):
        initialise(str(source), tmp_path / "start", settings(target_modules="q_proj("))
    with pytest.raises(UserError, match=r"no model's folder \(it has no config.json\)"):
        initialise(str(tmp_path / "nowhere"), tmp_path / "start", settings())
    shutil.rmtree(source)


def test_a_hub_id_that_cannot_be_had_is_refused(tmp_path, monkeypatch):
    from rankwise.directions import model_files

    def offline(*_: object, **__: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(model_files, "snapshot_download", offline)
    with pytest.raises(UserError, match="oak/tree is no folder and cannot be downloaded: no network"):
        initialise("oak/tree", tmp_path / "start", settings())
