"""What becomes of a trained AdaLoRA adapter: saved, loaded, inspected, and exported as plain LoRA."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

import rankwise as rw
import tiny
import tiny_adalora
import tiny_modules
from rankwise.analysis import read_adapter
from rankwise.errors import UserError
from rankwise.ranks import AdaloraAllocation, adalora_ranks
from tiny_adalora import STEPS, adapt, allocate, live


@pytest.fixture(params=list(tiny.TARGETS))
def trained(request) -> tuple[str, peft.PeftModel]:
    model = adapt(request.param)
    allocate(model)
    return request.param, model


def test_what_is_saved_loads_in_plain_peft(tmp_path, trained):
    family, model = trained
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny.make(family), tmp_path)
    torch.testing.assert_close(tiny.logits(loaded), tiny.logits(model), atol=1e-5, rtol=1e-5)
    assert live(loaded) == live(model)
    loaded.save_pretrained(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(tiny.make(family), tmp_path / "again")
    assert torch.equal(tiny.logits(again), tiny.logits(loaded))


def test_a_layer_of_rank_0_saves_loads_and_exports(tmp_path):
    """What peft#1539 was about: an empty lora_E is written and read."""
    model = adapt(target_r=1)
    allocate(model)
    assert 0 in live(model).values() and max(live(model).values()) > 1
    model.save_pretrained(tmp_path / "own")
    loaded = peft.PeftModel.from_pretrained(tiny.make("llama"), tmp_path / "own")
    torch.testing.assert_close(tiny.logits(loaded), tiny.logits(model), atol=1e-5, rtol=1e-5)
    rows = {row["module"]: row for row in read_adapter(tmp_path / "own")[0]}
    assert {name: row["live"] for name, row in rows.items()} == live(model)
    for number, one in enumerate((model, loaded)):
        report = rw.export(one, tmp_path / str(number))
        assert report.ranks == {name: rank for name, rank in live(model).items() if rank}
        plain = peft.PeftModel.from_pretrained(tiny.make("llama"), tmp_path / str(number))
        torch.testing.assert_close(tiny.logits(plain), tiny.logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["uniform", "compact", "merged"])
def test_exports(tmp_path, trained, layout):
    family, model = trained
    report = rw.export(model, tmp_path, layout=layout)
    assert report.ranks == {name: rank for name, rank in live(model).items() if rank}
    assert report.relative_error < 1e-6
    if layout == "merged":
        plain = type(tiny.make(family)).from_pretrained(tmp_path)
    else:
        plain = peft.PeftModel.from_pretrained(tiny.make(family), tmp_path)
        assert type(plain.peft_config["default"]) is peft.LoraConfig
    assert not torch.allclose(tiny.logits(tiny.make(family)), tiny.logits(model), atol=1e-3)
    torch.testing.assert_close(tiny.logits(plain.eval()), tiny.logits(model), atol=1e-6, rtol=1e-6)


def trained_module(kind: str) -> tuple[peft.PeftModel, torch.Tensor]:
    base, x = tiny_modules.make(kind)
    torch.manual_seed(1)
    chosen = tiny_adalora.config(target_modules=["only"], task_type=None, fan_in_fan_out=kind == "conv1d_of_gpt2")
    model = peft.get_peft_model(base, chosen)
    allocation, optimizer = AdaloraAllocation(model, STEPS), tiny_adalora.adamw(model)
    for number in range(1, STEPS + 1):
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        allocation.step(number)
        optimizer.zero_grad()
    allocation.finish()
    return model.eval(), x


@pytest.mark.parametrize("kind", ["linear", "conv1d_of_gpt2", "conv2d"])
def test_every_kind_of_module_exports(tmp_path, kind):
    model, x = trained_module(kind)
    assert adalora_ranks(model) == {"only": 2}
    assert rw.export(model, tmp_path).ranks == {"only": 2}
    plain = peft.PeftModel.from_pretrained(tiny_modules.make(kind)[0], tmp_path)
    assert not torch.allclose(plain.get_base_model().only.get_base_layer()(x), plain(x), atol=1e-3)
    torch.testing.assert_close(plain(x), model(x), atol=1e-6, rtol=1e-6)


def test_a_dilated_convolution_has_no_plain_form(tmp_path):
    """SVDConv2d is dilated as its base; the convolution A of plain LoRA is not."""
    base = tiny_modules.One(nn.Conv2d(3, 6, 2, dilation=2))
    model = peft.get_peft_model(base, tiny_adalora.config(target_modules=["only"], task_type=None))
    with pytest.raises(UserError, match="only: PEFT's adapter of a dilated convolution is not dilated"):
        rw.export(model, tmp_path)


def test_an_adapters_folder_is_inspected(tmp_path, trained):
    _, model = trained
    model.save_pretrained(tmp_path / "own")
    rows, counts = read_adapter(tmp_path / "own")
    assert {row["module"]: row["live"] for row in rows} == live(model)
    assert all(row["rank"] == row["live"] == row["configured_rank"] for row in rows)
    assert counts.get("modules with one LoRA matrix only") is None
    a_layer, row = tiny.layers(model)[rows[0]["module"]], rows[0]
    assert row["parameters"] == row["rank"] * (a_layer.in_features + a_layer.out_features + 1)


def test_an_adapter_saved_in_mid_training_is_inspected(tmp_path):
    model = adapt()
    with pytest.warns(UserWarning, match="training ended at step 6"):
        allocate(model, steps=6)
    model.save_pretrained(tmp_path)
    rows, _ = read_adapter(tmp_path)
    assert {row["module"]: row["live"] for row in rows} == live(model)
    assert all(row["rank"] == row["configured_rank"] == 4 for row in rows) and min(live(model).values()) < 4


def test_loading_with_little_memory_is_what_peft_cannot(tmp_path):
    """A fact of PEFT 0.21 that the docs state: when this fails, the docs are out of date."""
    model = adapt()
    allocate(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="nonzero"):
        peft.PeftModel.from_pretrained(tiny.make("llama"), tmp_path, low_cpu_mem_usage=True)


def test_a_loss_of_its_own_is_what_peft_cannot_compute_for_inference(tmp_path):
    """The same: forward wants the trainable adapter for its orthogonality term. Logits are there."""
    model = adapt()
    allocate(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny.make("llama"), tmp_path)
    with pytest.raises(AttributeError, match="trainable_adapter_name"):
        tiny.loss(loaded)
    assert torch.isfinite(tiny.logits(loaded)).all()
