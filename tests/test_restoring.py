from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file, save_file

import rankwise as rw
import tiny
import tiny_modules
from rankwise.errors import UserError
from rankwise.ranks import match_ranks, resize_adapter

KINDS: dict[str, tuple[type[peft.LoraConfig], dict[str, Any]]] = {
    "lora": (peft.LoraConfig, {}),
    "rslora": (peft.LoraConfig, {"use_rslora": True}),
    "sora": (rw.SoraConfig, {}),
    "sora of a part": (rw.SoraConfig, {"part": "minor"}),
}


def load(model: peft.PeftModel, folder: Path) -> None:
    match_ranks(model, folder)
    found = set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"), "default")
    assert not found.unexpected_keys


def keep(*kept: int, of: int = 4) -> torch.Tensor:
    return torch.tensor([number in kept for number in range(of)])


def three_sizes(model: peft.PeftModel, folder: Path) -> dict[str, torch.Tensor]:
    """Save an adapter as it is, without its first layer and smaller, and without its last as well; the logits."""
    names = list(tiny.layers(model))
    expected = {"whole": tiny.logits(model)}
    model.save_pretrained(folder / "whole")
    for name, cut in {"smaller": {names[0]: keep(), names[1]: keep(1, 3)}, "smallest": {names[-1]: keep()}}.items():
        resize_adapter(model, cut)
        tiny.train(model)
        model.save_pretrained(folder / name)
        expected[name] = tiny.logits(model)
    return expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", tiny.TARGETS)
def test_any_saved_size_loads_into_any_other(tmp_path, family, kind):
    """Layers come back that the live adapter has lost; a new classifier's head is the saved one."""
    config, settings = KINDS[kind]
    task = "SEQ_CLS" if family == "bert" else "CAUSAL_LM"
    model = tiny.adapted(family, config, task_type=task, **settings)
    expected = three_sizes(model, tmp_path)
    trained = sum(p.requires_grad for p in model.parameters())
    for name in ("whole", "smallest", "smaller", "smaller", "whole"):
        load(model, tmp_path / name)
        assert torch.equal(tiny.logits(model), expected[name])
        saved, live = peft.PeftConfig.from_pretrained(tmp_path / name), model.peft_config["default"]
        assert type(live) is config and not live.inference_mode and live.rank_pattern == saved.rank_pattern
        assert live.init_lora_weights == saved.init_lora_weights and live.modules_to_save == saved.modules_to_save
    assert sum(p.requires_grad for p in model.parameters()) > trained
    assert len(tiny.layers(model)) == 2 * len(tiny.TARGETS[family])
    before = tiny.logits(model)
    tiny.train(model)
    assert not torch.equal(tiny.logits(model), before)
    model.save_pretrained(tmp_path / "last")
    assert torch.equal(
        tiny.logits(peft.PeftModel.from_pretrained(tiny.make(family), tmp_path / "last")), tiny.logits(model)
    )


def test_where_the_shapes_are_the_same_nothing_is_done(tmp_path):
    model = tiny.adapted("llama")
    model.save_pretrained(tmp_path)
    parameters, config = dict(model.named_parameters()), model.peft_config["default"]
    match_ranks(model, tmp_path)
    assert all(value is parameters[name] for name, value in model.named_parameters())
    assert model.peft_config["default"] is config


def test_a_bfloat16_base_has_an_adapter_of_float32_still(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(tiny.make("llama", torch.bfloat16), config)
    expected = three_sizes(model, tmp_path)
    load(model, tmp_path / "whole")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(tiny.logits(model), expected["whole"])


@pytest.mark.parametrize("kind", tiny_modules.KINDS)
def test_every_kind_of_module(tmp_path, kind):
    model, x = tiny_modules.adapt(kind, peft.LoraConfig)
    tiny_modules.train(model, x).save_pretrained(tmp_path)
    expected = model(x)
    resize_adapter(model, {"only": keep(2, of=3)}, {"only": 4})
    load(model, tmp_path)
    assert torch.equal(model(x), expected)


def test_other_adapters_stay(tmp_path):
    model = tiny.adapted("llama")
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter("second")
    second = tiny.logits(model)
    model.set_adapter("default")
    whole = tiny.logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    names = list(tiny.layers(model))
    resize_adapter(model, {names[0]: keep(), names[1]: keep()})
    load(model, tmp_path)
    assert torch.equal(tiny.logits(model), whole)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "second" in name)
    model.set_adapter("second")
    assert torch.equal(tiny.logits(model), second)


def test_milora_is_left_to_its_own_loading(tmp_path):
    """Its saved form is plain LoRA of twice the rank."""
    model = tiny.adapted("llama", rw.MiloraConfig)
    model.save_pretrained(tmp_path)
    config = model.peft_config["default"]
    match_ranks(model, tmp_path)
    assert model.peft_config["default"] is config


def test_an_adapter_of_another_kind_is_refused(tmp_path):
    tiny.adapted("llama", rw.SoraConfig).save_pretrained(tmp_path)
    model = tiny.adapted("llama")
    expected = tiny.logits(model)
    with pytest.raises(UserError, match="holds an adapter of SoraConfig, and the model's is LoraConfig"):
        match_ranks(model, tmp_path)
    assert torch.equal(tiny.logits(model), expected)


def test_tensors_that_are_not_those_of_the_config_are_refused(tmp_path):
    model = tiny.adapted("llama")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    gone = next(iter(tensors))
    del tensors[gone]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=f"does not fit the model: {gone} has another shape, or is not in both"):
        match_ranks(model, tmp_path)
