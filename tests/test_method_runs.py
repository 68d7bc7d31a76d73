"""Whole runs with methods that are no LoRA: trained, measured, resumed, opened again, exported; and the list of all."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

import small_runs
import tiny
import tiny_methods
from rankwise import MiloraConfig
from rankwise.cli import main
from rankwise.errors import UserError
from rankwise.evaluation import evaluate_run, export_folder
from rankwise.methods.listing import method_rows
from rankwise.models import context_limit, load_tokenizer
from rankwise.peft_bridge import adapted_layers
from rankwise.recipes import make_recipe
from rankwise.run import Run
from rankwise.schema import METHODS, ModelSettings

ADAPTERS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "houlsby": {"kind": "houlsby", "size": 4},
    "prompt": {"kind": "prompt", "tokens": 3},
    "prefix": {"kind": "prefix", "tokens": 3},
    "vera": {"kind": "vera", "r": 8},
    "dora": {"kind": "dora", "r": 2},
    "olora": {"kind": "olora", "r": 2},
}


def run(kind: str, folder: Path, base: Path, adapter: Any, **changes: Any) -> dict[str, Any]:
    return Run(small_runs.recipe(kind, folder, base, adapter=adapter, **changes), small_runs.silent())()


def loss(results: dict[str, Any], name: str) -> float:
    [row] = [row for row in results["rows"] if row["name"] == name]
    return float(row["metrics"]["loss"])


def training_losses(folder: Path, stage: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["stage"] == stage and "loss" in line]


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_run_on_text(name: str, tmp_path: Path, model_folder: Path) -> None:
    before = small_runs.hashes(model_folder)
    results = run("text", tmp_path, model_folder, ADAPTERS[name], stages=[small_runs.LONG])
    assert small_runs.hashes(model_folder) == before
    assert loss(results, "sft") < loss(results, "base model")
    assert results["export"]["parameters"] > 0
    folder = Path(tmp_path / "run")
    assert (folder / "report.html").stat().st_size > 1000
    again = evaluate_run(folder, [], small_runs.silent())
    assert again["rows"][-1]["metrics"] == pytest.approx(results["rows"][-1]["metrics"], rel=1e-5)
    if results["export"]["layout"] == "merged":
        loaded = AutoModelForCausalLM.from_pretrained(folder / "adapter")
    else:
        base = AutoModelForCausalLM.from_pretrained(model_folder)
        loaded = PeftModel.from_pretrained(base, folder / "adapter")
    with torch.no_grad():
        loaded.eval()(input_ids=tiny.IDS % 20)
    export_folder(
        folder,
        tmp_path / "again",
        small_runs.silent(),
        rank=None,
        energy=None,
    )
    assert {path.name for path in (tmp_path / "again").iterdir()} <= {
        path.name for path in (folder / "adapter").iterdir()
    }


@pytest.mark.parametrize("name", ["full", "houlsby", "prompt", "prefix"])
def test_preference_training(name: str, tmp_path: Path, model_folder: Path) -> None:
    """The reference is the model as the stage found it, whatever is trained."""
    stages = [small_runs.SFT, small_runs.DPO | {"learning_rate": 1e-2, "epochs": 4}]
    results = run("preferences", tmp_path, model_folder, ADAPTERS[name], stages=stages)
    assert [row["name"] for row in results["rows"]] == ["base model", "sft", "softmax_dpo"]
    losses = training_losses(tmp_path / "run", "softmax_dpo")
    assert losses[0] == pytest.approx(math.log(4), rel=0.02)  # three rejected answers, and the policy its reference
    assert losses[-1] < losses[0]


def test_full_fine_tuning_has_no_base_for_a_reference(tmp_path: Path, model_folder: Path) -> None:
    stages = [small_runs.SFT, small_runs.DPO | {"reference": "base"}]
    with pytest.raises(UserError, match="reference base of softmax_dpo needs an adapter that can be left out"):
        run("preferences", tmp_path, model_folder, "full", stages=stages)


def test_a_run_on_labels_with_biases_alone(tmp_path: Path, tiny_tokenizer: Any) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    model = BertForSequenceClassification(BertConfig(vocab_size=len(tiny_tokenizer), initializer_range=0.2, **sizes))
    for made in (model, tiny_tokenizer):
        made.save_pretrained(tmp_path / "base")
    results = run("classification", tmp_path, tmp_path / "base", "bitfit", stages=[small_runs.SFT | {"epochs": 16}])
    assert [row["name"] for row in results["rows"]][-1] == "sft"
    losses = training_losses(tmp_path / "run", "sft")
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


# What is refused


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_virtual_tokens_have_no_place_in_a_catalogue(name: str, tmp_path: Path, model_folder: Path) -> None:
    with pytest.raises(UserError, match=rf"adapter.kind {name} is not for data of kind interactions"):
        small_runs.recipe("interactions", tmp_path, model_folder, adapter=name)


@pytest.mark.parametrize(
    ("adapter", "layout", "message"),
    [
        ("dora", "uniform", r"layout uniform is none of this adapter \(kind lora, use_dora\): use own or merged"),
        ("full", "uniform", r"\(kind full\): use merged"),
        ("houlsby", "merged", r"\(kind bottleneck\): use own"),
        ("vera", "compact", r"\(kind vera\): use own or merged"),
        ("milora", "own", r"\(kind milora\): use uniform or compact or merged"),
    ],
)
def test_forms_that_a_method_has_not(
    adapter: str, layout: str, message: str, tmp_path: Path, model_folder: Path
) -> None:
    with pytest.raises(UserError, match=message):
        small_runs.recipe("text", tmp_path, model_folder, adapter=adapter, export={"layout": layout})


def test_virtual_tokens_take_room(model_folder: Path) -> None:
    tokenizer, settings = load_tokenizer(str(model_folder)), ModelSettings(path=str(model_folder))
    whole = context_limit(settings, tokenizer)
    assert context_limit(settings, tokenizer, 5) == whole - 5
    with pytest.raises(UserError, match=rf"adapter.tokens {whole} leaves no room in the model's {whole} positions"):
        context_limit(settings, tokenizer, whole)
    wanted = ModelSettings(path=str(model_folder), context=whole)
    with pytest.raises(UserError, match=rf"is more than the model's {whole} less the adapter's 5: give {whole - 5} or"):
        context_limit(wanted, tokenizer, 5)


# Names


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_name_stands_for_its_settings(name: str) -> None:
    rest = {"data": {"kind": "text", "train": "-"}, "stages": [{"kind": "sft"}], "output": "-"}
    by_name = make_recipe({"adapter": name, **rest}).adapter
    assert by_name == make_recipe({"adapter": dict(METHODS[name].settings), **rest}).adapter
    assert by_name.kind == METHODS[name].settings["kind"]


def test_what_a_name_says_can_be_changed_where_it_is_a_number() -> None:
    rest = {"data": {"kind": "text", "train": "-"}, "stages": [{"kind": "sft"}], "output": "-"}
    assert make_recipe({"adapter": {"kind": "lora_plus", "lora_plus_ratio": 4}, **rest}).adapter.lora_plus_ratio == 4
    with pytest.raises(UserError, match=r"adapter.part 'minor' is not PiSSA, whose part is 'principal'"):
        make_recipe({"adapter": {"kind": "pissa", "part": "minor"}, **rest})


def test_olora_starts_as_pefts_own_does() -> None:
    """The same function and the same factors, on a base that stays as it was."""
    ours = peft.get_peft_model(tiny.make("llama"), MiloraConfig(r=3, target_modules=["q_proj"], part="qr"))
    theirs = peft.get_peft_model(
        tiny.make("llama"), peft.LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj"], init_lora_weights="olora")
    )
    others = dict(adapted_layers(theirs, "default"))
    assert len(others) == 2
    for name, layer in adapted_layers(ours, "default"):
        products = [one.lora_B["default"].weight @ one.lora_A["default"].weight for one in (layer, others[name])]
        torch.testing.assert_close(*products)
    torch.testing.assert_close(tiny.logits(ours), tiny.logits(theirs), rtol=1e-4, atol=1e-4)


# The list


def test_parameters_are_those_that_train(model_folder: Path) -> None:
    rows = {row["name"]: row for row in method_rows(str(model_folder))}
    assert list(rows) == list(METHODS)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    assert rows["full"]["parameters"] == model.num_parameters()
    assert rows["full"]["share"] == 1
    made = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert rows["lora"]["parameters"] == rows["milora"]["parameters"] == made.get_nb_trainable_parameters()[0]
    assert rows["bitfit"]["parameters"] is None
    assert "has none" in rows["bitfit"]["reason"]


def test_the_list_for_a_classifier(tmp_path: Path) -> None:
    tiny.make("bert").save_pretrained(tmp_path)
    rows = {row["name"]: row for row in method_rows(str(tmp_path), classes=3)}
    assert all(row["parameters"] for row in rows.values())
    model = tiny.make("bert")
    biases = sum(w.numel() for name, w in model.named_parameters() if name.endswith("bias"))
    assert rows["bitfit"]["parameters"] == biases + model.classifier.weight.numel()
    with pytest.raises(UserError, match=r"\(bert\) is no decoder: say --classes"):
        method_rows(str(tmp_path))
    with pytest.raises(UserError, match="--classes 1 is not possible"):
        method_rows(str(tmp_path), classes=1)


def test_the_list_for_an_encoder_decoder(tmp_path: Path) -> None:
    tiny_methods.base("encoder-decoder").save_pretrained(tmp_path)
    rows = {row["name"]: row for row in method_rows(str(tmp_path))}
    assert all(row["parameters"] for row in rows.values())
    assert rows["full"]["parameters"] == tiny_methods.base("encoder-decoder").num_parameters()


def test_the_command(capsys: pytest.CaptureFixture[str], model_folder: Path) -> None:
    assert main(["methods", "--model", str(model_folder)]) == 0
    shown = capsys.readouterr().out
    assert "MiLoRA with SoRA" in shown
    assert "2406.09044, 2311.11696" in shown
    assert "bitfit: adapter.kind bitfit trains biases" in shown
    assert main(["methods", "--model", str(model_folder), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["methods"]) == len(METHODS)
