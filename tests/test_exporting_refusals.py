"""What export refuses, and what it leaves whole when it fails."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import PreTrainedModel

import rankwise as rw
import tiny
from rankwise import MiloraConfig
from rankwise.directions.streaming import START
from rankwise.errors import UserError
from rankwise.files import new_folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_export_replaces_an_earlier_one(tmp_path):
    model = tiny.adapted("llama")
    rw.export(model, tmp_path / "adapter")
    rw.export(model, tmp_path / "adapter", rank=1)
    names = ("adapter_config.json", "adapter_model.safetensors", "manifest.json")
    assert contents(tmp_path).keys() == {f"adapter/{name}" for name in names}
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 1


def test_a_crash_while_writing_leaves_the_earlier_one(tmp_path, monkeypatch):
    model = tiny.adapted("llama")
    rw.export(model, tmp_path / "adapter")
    before = contents(tmp_path)

    def crash(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("rankwise.exporting.plain_lora.save_file", crash)
    for folder in ("adapter", "other"):
        with pytest.raises(OSError, match="no space left"):
            rw.export(model, tmp_path / folder, rank=1)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["notes.txt", "more/notes.txt", "adapter_model.bin"])
def test_an_export_with_something_of_another_is_not_replaced(tmp_path, name):
    model = tiny.adapted("llama")
    rw.export(model, tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("precious")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=rf"something other than an earlier export \({name}\): give a new folder"):
        rw.export(model, tmp_path, rank=1)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("layout", ["uniform", "merged", "own"])
@pytest.mark.parametrize("kind", ["a stage", "a start", "saved by PEFT", "another program's", "a list for a manifest"])
def test_what_looks_like_an_export_is_not_replaced(tmp_path, kind, layout):
    """A trained checkpoint above all, which has the same files."""
    model = tiny.adapted("llama")
    if kind == "a list for a manifest":
        (tmp_path / "manifest.json").write_text("[{}]")
    elif kind == "another program's":
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "adapter_config.json").write_text("{}")
    elif kind == "saved by PEFT":
        model.save_pretrained(tmp_path)
    else:
        with new_folder(tmp_path / "made", None if kind == "a stage" else START) as made:
            model.save_pretrained(made)
    folder = tmp_path / "made" if (tmp_path / "made").exists() else tmp_path
    before = contents(tmp_path)
    with pytest.raises(UserError, match="something other than an earlier export"):
        rw.export(model, folder, layout=layout)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("layout", ["uniform", "merged"])
def test_a_folder_of_other_things_is_not_replaced(tmp_path, layout):
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(UserError, match="holds something other than an earlier export"):
        rw.export(tiny.adapted("llama"), tmp_path, layout=layout)
    with pytest.raises(UserError, match="give a new folder"):
        rw.export(tiny.adapted("llama"), tmp_path / "notes.txt", layout=layout)
    assert contents(tmp_path) == {"notes.txt": b"precious"}
    (tmp_path / "empty").mkdir()
    rw.export(tiny.adapted("llama"), tmp_path / "empty", layout=layout)


def infinite() -> peft.PeftModel:
    model = tiny.adapted("llama")
    tiny.layers(model)["model.layers.1.mlp.down_proj"].lora_A["default"].weight.data[0, 0] = torch.nan
    return model


def beside() -> peft.PeftModel:
    """An adapter on a base that another one changed."""
    model = tiny.adapted("llama")
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="olora"))
    return model


def inside() -> PreTrainedModel:
    """An adapter that transformers keeps in its own model."""
    model = tiny.make("llama")
    model.add_adapter(MiloraConfig(r=2, target_modules=["q_proj"]))
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: tiny.adapted("llama", use_dora=True),
            "use_dora=True is no product.*layout='merged', or ship the folder of save_pretrained",
        ),
        (
            lambda: tiny.adapted("llama", MiloraConfig, use_dora=True),
            "use_dora=True is no product.*layout='merged', or ship the folder of save_pretrained",
        ),
        (lambda: tiny.adapted("bert", lora_bias=True), "lora_bias has no plain LoRA form"),
        (
            lambda: tiny.adapted("llama", init_lora_weights="pissa"),
            "init_lora_weights='pissa' changed the base weights",
        ),
        (
            lambda: tiny.adapted("llama", init_lora_weights="OLoRA"),
            "init_lora_weights='OLoRA' changed the base weights",
        ),
        (beside, "adapter 'other' with init_lora_weights='olora' changed the base weights"),
        (infinite, r"model.layers.1.mlp.down_proj: the adapter holds NaN or infinity"),
        (lambda: tiny.make("llama"), "not LlamaForCausalLM: use peft.get_peft_model first"),
        (inside, r"of this LlamaForCausalLM was added by its own add_adapter.*make it with peft\.get_peft_model"),
        (
            lambda: peft.get_peft_model(
                tiny.make("llama"), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
            ),
            r"adapter 'default' \(IA3Config\) has no LoRA layers",
        ),
    ],
    ids=["dora", "milora with dora", "lora_bias", "pissa", "olora", "beside", "nan", "base", "inside", "ia3"],
)
def test_what_has_no_plain_lora_is_refused_and_nothing_written(tmp_path, build, message):
    with pytest.raises(UserError, match=message):
        rw.export(build(), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank 0 is not possible: it must be 1 or more"),
        ({"energy": 0.0}, "energy 0.0 is not possible"),
        ({"energy": 1.01}, "energy 1.01 is not possible"),
        ({"energy": float("nan")}, "energy nan is not possible"),
        ({"layout": "unifrom"}, "layout 'unifrom' is unknown: did you mean 'uniform'"),
        ({"layout": "merged", "rank": 2}, "leave rank and energy out"),
        ({"layout": "merged", "energy": 0.5}, "leave rank and energy out"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(tmp_path, settings, message):
    export = inspect.unwrap(rw.export)  # without the check of types, which runs in tests alone
    with pytest.raises(UserError, match=message):
        export(tiny.adapted("llama"), tmp_path / "adapter", **settings)
    assert not list(tmp_path.iterdir())
