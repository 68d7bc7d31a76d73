"""Updates of weights, against what each layer answers with and without its adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, VeraConfig, get_peft_model
from peft.tuners.vera.layer import Linear as VeraLinear
from torch import Tensor

import small_runs
import tiny
from rankwise import MiloraConfig, SoraConfig
from rankwise.analysis.places import update_place, update_places
from rankwise.analysis.weight_updates import Update, weight_updates
from rankwise.errors import UserError
from rankwise.methods.in_place import train_all
from rankwise.peft_bridge.merging import merged_in_float64
from rankwise.run import Run


def dense(update: Update | None) -> Tensor:
    assert update is not None
    return update.double() if isinstance(update, Tensor) else update[0].double() @ update[1].double()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize(
    "made",
    [{}, {"use_dora": True}, {"config": MiloraConfig, "use_dora": True}, {"config": SoraConfig}],
    ids=["lora", "dora", "milora with dora", "sora"],
)
def test_an_update_is_what_the_layer_adds(family: str, made: dict[str, Any]) -> None:
    model = tiny.adapted(family, **made)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits = tiny.logits(model)
    expected = tiny.dense_updates(model)
    found = {name: dense(update) for name, _, update in weight_updates(model)}
    assert found.keys() == expected.keys()
    for name, update in found.items():
        assert torch.allclose(update, expected[name], atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(tiny.logits(model), logits)
    assert not any(layer.merged for layer in tiny.layers(model).values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_the_update_of_vera_is_what_the_layer_adds(family: str) -> None:
    settings = {"r": 8, "target_modules": tiny.TARGETS[family], "fan_in_fan_out": family == "gpt2"}
    model = tiny.train(get_peft_model(tiny.make(family), VeraConfig(**settings)))
    base = dict(tiny.make(family).named_modules())
    found = list(weight_updates(model))
    layers = {name: layer for name, layer in model.get_base_model().named_modules() if isinstance(layer, VeraLinear)}
    assert [name for name, _, _ in found] == list(layers)
    for name, weight, update in found:
        inputs = torch.eye(layers[name].in_features)
        with torch.no_grad():
            added = (layers[name](inputs) - layers[name].get_base_layer()(inputs)).T
        assert weight is not None and torch.equal(weight.T if family == "gpt2" else weight, base[name].weight)
        assert torch.allclose(dense(update), added.double(), atol=1e-5) and added.abs().max() > 0


def test_a_merge_that_fails_leaves_the_layer_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.adapted("llama", use_dora=True)
    before, logits = {name: value.clone() for name, value in model.state_dict().items()}, tiny.logits(model)
    layer = next(iter(tiny.layers(model).values()))
    with pytest.raises(MemoryError), merged_in_float64(layer, "default"):
        raise MemoryError
    monkeypatch.setattr(type(layer), "merge", lambda *_, **__: (_ for _ in ()).throw(NotImplementedError))
    assert {update for _, _, update in weight_updates(model)} == {None}
    assert all(
        torch.equal(value, before[name]) and value.dtype == before[name].dtype
        for name, value in model.state_dict().items()
    )
    assert not any(one.merged for one in tiny.layers(model).values())
    assert torch.equal(tiny.logits(model), logits)
    with pytest.raises(UserError, match="no module of the model has an update to look at"):
        update_places(model, 2)


def full(family: str) -> PeftModel:
    model = train_all(tiny.make(family))
    tiny.train(model)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_full_fine_tuning_changes_each_linear_module_but_the_head(family: str) -> None:
    model, base = full(family), dict(tiny.make(family).named_modules())
    trained = dict(model.get_base_model().named_modules())
    found = list(weight_updates(model))
    assert len(found) == {"llama": 14, "gpt2": 8, "bert": 13}[family]
    assert not {"lm_head", "classifier"} & {name for name, _, _ in found}
    for name, weight, update in found:
        expected, before = trained[name].weight - base[name].weight, base[name].weight
        assert torch.equal(weight, before.T if family == "gpt2" else before)
        assert torch.equal(dense(update).float(), expected.T if family == "gpt2" else expected)
    rows, counts = update_places(model, 2)
    pooler = family == "bert"  # its biases and a classifier's loss reach it
    assert len(rows) + counts.get("modules without an update", 0) == len(found)
    assert pooler or counts == {}


def test_one_matrix_lies_where_its_factors_do() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, b, a = (torch.randn(*shape, generator=generator) for shape in ((12, 9), (12, 3), (3, 9)))
    one, two = update_place(weight, b @ a, 3), update_place(weight, (b, a), 3)
    assert {name: one[name] for name in one if name != "spectra"} == {
        name: pytest.approx(two[name], rel=1e-4) for name in two if name != "spectra"
    }


def test_a_run_that_trains_all_weights_tells_where_they_went(tmp_path: Path, model_folder: Path) -> None:
    recipe = small_runs.recipe("text", tmp_path, model_folder, adapter={"kind": "full"}, evaluation={"updates": 4})
    Run(recipe, small_runs.silent())()
    assert "Where the updates lie" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
