from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import rankwise as rw
import small_runs
import test_milora_trainers as trainers
import tiny
from rankwise import cli
from rankwise.adapters import load_adapter_folder
from rankwise.directions import initialise
from rankwise.errors import UserError
from rankwise.evaluation import export_folder
from tiny_starts import settings

EXPORT: dict[str, Any] = {"rank": None, "energy": None, "layout": "uniform"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tiny.make("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def base(source: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source).eval()


def plain(folder: Path, source: Path) -> torch.Tensor:
    """What stock PEFT computes with an exported folder."""
    return tiny.logits(peft.PeftModel.from_pretrained(base(source), folder))


CONFIGS = {
    "lora": peft.LoraConfig(r=4, target_modules=["q_proj"]),
    "milora": rw.MiloraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "milora of a task": rw.MiloraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "sora": rw.SoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapters_own_folder_is_exported(tmp_path, source, kind):
    model = tiny.train(peft.get_peft_model(base(source), CONFIGS[kind]))
    model.save_pretrained(tmp_path / "adapter")
    report = export_folder(tmp_path / "adapter", tmp_path / "out", small_runs.silent(), **EXPORT)
    assert report["relative_error"] < 1e-5
    torch.testing.assert_close(plain(tmp_path / "out", source), tiny.logits(model), atol=1e-5, rtol=1e-5)


def test_a_trainers_checkpoint_is_exported_by_the_command(tmp_path, source, capsys):
    model = peft.get_peft_model(base(source), trainers.milora())
    trainers.trainer(model, tmp_path / "run", 2).train()
    words = ["export", str(tmp_path / "run" / "checkpoint-2"), str(tmp_path / "out"), "--rank", "3", "--json"]
    assert cli.main(words) == 0
    assert max(json.loads(capsys.readouterr().out.splitlines()[-1])["ranks"].values()) == 3
    assert cli.main([*words[:2], str(tmp_path / "merged"), "--layout", "merged"]) == 0
    torch.testing.assert_close(tiny.logits(base(tmp_path / "merged")), tiny.logits(model.eval()), atol=1e-5, rtol=1e-5)


def test_the_base_may_be_given(tmp_path, source):
    initialise(str(source), tmp_path / "start", settings())
    source.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"base.* no model's folder"):
        load_adapter_folder(tmp_path / "start")
    model = load_adapter_folder(tmp_path / "start", str(tmp_path / "moved"))
    assert torch.equal(tiny.logits(model), tiny.logits(tiny.make("llama")))
    other = tiny.make("llama")
    other.model.layers[0].self_attn.q_proj.weight.data[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="q_proj: the base weight is not the one"):
        load_adapter_folder(tmp_path / "start", str(tmp_path / "other"))


def test_a_start_of_the_model_that_ships_finds_it(tmp_path):
    initialise("embedded", tmp_path / "start", settings(target_modules=["v_proj"], r=2))
    assert export_folder(tmp_path / "start", tmp_path / "out", small_runs.silent(), **EXPORT)["relative_error"] == 0


def test_a_classifier_has_the_classes_of_its_head(tmp_path):
    tiny.make("bert").save_pretrained(tmp_path / "base")
    from transformers import AutoModelForSequenceClassification

    five = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=5, ignore_mismatched_sizes=True
    )
    config = rw.MiloraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
    model = tiny.train(peft.get_peft_model(five.eval(), config))
    expected = tiny.logits(model)
    model.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(tiny.logits(load_adapter_folder(tmp_path / "adapter")), expected)


def no_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def half_a_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"r": ')


def no_base(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))


def another_base(folder: Path) -> None:
    tiny.make("bert").save_pretrained(folder / "other")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(folder / "other")}))


def far_too_large(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 10**12}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (far_too_large, r"adapter_config.json: r 1000000000000 is far more than the matrices of the model have: give"),
        (no_weights, "holds no adapter_model.safetensors"),
        (half_a_config, "is not JSON"),
        (no_base, "names no base model: give it with --model"),
        (another_base, "on .*other cannot be loaded: .*; save the adapter again, or give its base with --model"),
    ],
    ids=["far too large", "no weights", "half a config", "no base", "another base"],
)
def test_folders_that_are_refused(tmp_path, source, damage, message):
    peft.get_peft_model(base(source), CONFIGS["lora"]).save_pretrained(tmp_path / "adapter")
    damage(tmp_path / "adapter")
    with pytest.raises(UserError, match=message):
        load_adapter_folder(tmp_path / "adapter")
