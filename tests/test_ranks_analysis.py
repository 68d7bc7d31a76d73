from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import rankwise as rw
from rankwise.analysis import grid_table, rank_grid, rank_table, read_adapter, read_ranks, split_module
from rankwise.analysis.inspection import inspection
from rankwise.analysis.ranks import live_directions, update_spectrum
from rankwise.errors import UserError


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    lora = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={r"layers\.1\.mlp\.down_proj": 3},
        init_lora_weights=False,
    )
    peft.get_peft_model(LlamaForCausalLM(config), lora).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def render(table) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(table)
    return console.file.getvalue()


def printed(*table) -> str:
    return render(rank_table(*table))


def key(layer: int, kind: str, part: str) -> str:
    return f"base_model.model.model.layers.{layer}.{kind}.lora_{part}.weight"


def test_ranks_of_a_plain_peft_adapter(adapter):
    rows, counts = read_adapter(adapter)
    assert counts == {}
    assert {row["module"]: row["rank"] for row in rows} == {
        "model.layers.0.mlp.down_proj": 4,
        "model.layers.0.self_attn.q_proj": 4,
        "model.layers.1.mlp.down_proj": 3,
        "model.layers.1.self_attn.q_proj": 4,
    }
    assert all(row["rank"] == row["live"] == row["configured_rank"] for row in rows)
    down = next(row for row in rows if row["module"] == "model.layers.1.mlp.down_proj")
    assert (down["parameters"], down["bytes"]) == (3 * (24 + 16), 3 * (24 + 16) * 4)


def test_effective_rank_is_that_of_the_product(adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    product = tensors[key(0, "self_attn.q_proj", "B")] @ tensors[key(0, "self_attn.q_proj", "A")]
    values = np.linalg.svd(product.double().numpy(), compute_uv=False)[:4]
    shares = values / values.sum()
    row = next(row for row in read_ranks(adapter) if row["module"] == "model.layers.0.self_attn.q_proj")
    assert row["effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)
    assert 1 < row["effective_rank"] < 4


def test_zero_padding_is_stored_but_not_live(adapter):
    def pad(tensors):
        tensors[key(0, "self_attn.q_proj", "A")][2:] = 0
        tensors[key(0, "self_attn.q_proj", "B")][:, 3:] = 0
        tensors[key(1, "self_attn.q_proj", "B")][:, 1] = 0
        tensors[key(1, "mlp.down_proj", "B")].zero_()

    rewrite(adapter, pad)
    rows = {row["module"]: row for row in read_ranks(adapter)}
    assert [rows[f"model.layers.{layer}.self_attn.q_proj"]["rank"] for layer in (0, 1)] == [4, 4]
    assert [rows[f"model.layers.{layer}.self_attn.q_proj"]["live"] for layer in (0, 1)] == [2, 3]
    assert rows["model.layers.0.self_attn.q_proj"]["effective_rank"] < 2.0 + 1e-6
    assert (
        rows["model.layers.1.mlp.down_proj"]["live"],
        rows["model.layers.1.mlp.down_proj"]["effective_rank"],
    ) == (0, 0.0)


@pytest.mark.parametrize("shape", [(4,), (1, 4), (4, 1)])
@pytest.mark.parametrize("ending", ["", ".weight", ".default"])
def test_gates_close_directions_and_other_tensors_are_counted(adapter, shape, ending):
    def gate(tensors):
        stem = "base_model.model.model.layers.0.self_attn.q_proj"
        tensors[f"{stem}.lora_gate{ending}"] = torch.tensor([1.0, 0.0, -2.0, 0.0]).reshape(shape)
        tensors["base_model.model.classifier.weight"] = torch.ones(2, 2)

    rewrite(adapter, gate)
    rows, counts = read_adapter(adapter)
    row = next(row for row in rows if row["module"] == "model.layers.0.self_attn.q_proj")
    assert (row["rank"], row["live"], row["parameters"]) == (4, 2, 4 * 32 + 4)
    assert counts == {"tensors other than LoRA": 1}


def test_the_update_is_counted_from_the_start_that_an_adapter_keeps(adapter):
    """A = A0 but for one row, B = B0: one direction is live, though four are stored."""
    stem = "base_model.model.model.layers.0.self_attn.q_proj"

    def start(tensors):
        tensors[f"{stem}.lora_start.A"] = tensors[f"{stem}.lora_A.weight"].clone()
        tensors[f"{stem}.lora_start.B"] = tensors[f"{stem}.lora_B.weight"].clone()

    def step(tensors):
        tensors[f"{stem}.lora_A.weight"][2] += 0.1

    rewrite(adapter, start)
    at_start = next(row for row in read_ranks(adapter) if row["module"].endswith("0.self_attn.q_proj"))
    rewrite(adapter, step)
    after = next(row for row in read_ranks(adapter) if row["module"].endswith("0.self_attn.q_proj"))
    assert (at_start["live"], at_start["effective_rank"]) == (0, 0.0)
    assert (after["live"], after["effective_rank"]) == (1, pytest.approx(1.0, abs=1e-5))
    assert (after["rank"], after["parameters"], after["bytes"]) == (4, 4 * 32, 2 * 4 * 32 * 4)


def test_the_update_of_milora_is_counted_from_its_start(tmp_path):
    """A = A0 but for one row, B = B0: one direction is live, though eight are stored for a rank of four."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    adapted = peft.get_peft_model(LlamaForCausalLM(config), rw.MiloraConfig(r=4, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        next(one for name, one in adapted.named_parameters() if "lora_A" in name)[2] += 0.1
    adapted.save_pretrained(tmp_path / "step")
    (at_start,), (after,) = read_ranks(tmp_path / "start"), read_ranks(tmp_path / "step")
    assert (at_start["effective_rank"], after["effective_rank"]) == (0.0, pytest.approx(1.0, abs=1e-5))
    assert (at_start["rank"], at_start["live"]) == (8, 0)
    assert (after["rank"], after["live"], after["configured_rank"]) == (8, 1, 4)
    assert (after["parameters"], after["bytes"], after["stacked_start"]) == (4 * 32, 2 * 4 * 32 * 4, True)
    assert "MiLoRA: rank r is stored as 2 r" in printed([after])


def test_a_trained_direction_of_milora_has_two_live_halves(tmp_path):
    """Both of its factors moved: b a - b0 a0 has rank two. All four moved: eight are live, as eight are stored."""
    a0, b0 = torch.randn(4, 6), torch.randn(5, 4)
    for moved, live, effective in (([1], 2, 2), ([0, 1, 2, 3], 8, 5)):
        a, b = a0.clone(), b0.clone()
        a[moved] += torch.randn(len(moved), 6)
        b[:, moved] += torch.randn(5, len(moved))
        assert live_directions(torch.cat([a, a0]), torch.cat([b, -b0], dim=1), torch.ones(8), (a0, b0)) == live
        assert int(np.linalg.matrix_rank((b @ a - b0 @ a0).double().numpy(), tol=1e-4)) == effective


def test_a_gate_closes_the_change_of_a_direction(tmp_path):
    """SoRA over a part of the spectrum: the gate multiplies b a - b0 a0, so it is on the start as well."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    sora = rw.SoraConfig(r=4, target_modules=["q_proj"], part="minor")
    adapted = peft.get_peft_model(LlamaForCausalLM(config), sora)
    layer = adapted.get_base_model().model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_A["default"].weight[:3] += 0.1
        layer.lora_gate["default"].copy_(torch.tensor([2.0, 0.0, -0.5, 1.0]))
        identity = torch.eye(16)
        update = (layer(identity) - layer.get_base_layer()(identity)).double()
    adapted.save_pretrained(tmp_path)
    (row,) = read_ranks(tmp_path)
    values = np.linalg.svd(update.numpy(), compute_uv=False)[:2]
    shares = values / values.sum()
    assert (row["rank"], row["live"]) == (4, 2)
    assert row["effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)


@pytest.mark.parametrize(("name", "stored"), [("SoraConfig", 4), ("MiloraConfig", 8)])
def test_our_own_adapters_are_read_as_they_are_trained(tmp_path, name, stored):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    adapted = peft.get_peft_model(LlamaForCausalLM(config), getattr(rw, name)(r=4, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path)
    (row,), counts = read_adapter(tmp_path)
    assert (row["rank"], row["effective_rank"], counts) == (stored, 0.0, {})
    assert row["configured_rank"] == 4
    assert row["parameters"] == sum(one.numel() for one in adapted.parameters() if one.requires_grad)


def test_the_grid_shows_live_directions_and_totals_by_kind(adapter):
    def close(tensors):
        tensors[key(1, "self_attn.q_proj", "B")][:, 1] = 0

    rewrite(adapter, close)
    rows, counts = read_adapter(adapter)
    shown = inspection(rows, counts)
    assert shown["grid"] == {
        "layers": ["layer 0", "layer 1"],
        "kinds": ["down_proj", "q_proj"],
        "ranks": [[4, 4], [3, 3]],
    }
    assert shown["kinds"] == [
        {"kind": "down_proj", "modules": 2, "live": 7, "parameters": 7 * 40, "bytes": 4 * 7 * 40},
        {"kind": "q_proj", "modules": 2, "live": 7, "parameters": 8 * 32, "bytes": 4 * 8 * 32},
    ]
    assert shown["modules"] == rows and shown["counts"] == {}
    text = render(grid_table(rows))
    lines = [line.replace("│", " ").replace("┃", " ").split() for line in text.splitlines()]
    assert ["layer", "0", "4", "4", "8"] in lines and ["layer", "1", "3", "3", "6"] in lines
    assert ["all", "layers", "7", "7", "14"] in lines
    assert ["parameters", "280", "256", "536"] in lines
    assert ["bytes", "1,120", "1,024", "2,144"] in lines


def test_a_module_that_a_layer_lacks_is_left_blank():
    rows = [
        {"module": name, "live": 2, "parameters": 8, "bytes": 32}
        for name in ("layers.0.q", "layers.0.v", "layers.1.q", "head")
    ]
    lines = [line.replace("│", " ").split() for line in render(grid_table(rows)).splitlines()]
    assert ["layer", "1", "2", "2"] in lines and ["outside", "layers", "2", "2"] in lines


def test_a_damaged_side_file_is_named(adapter):
    (adapter / "milora.json").write_text('{"format": 1, "conf')
    with pytest.raises(UserError, match=r"milora\.json is not JSON"):
        read_adapter(adapter)


def test_update_spectrum_agrees_with_numpy():
    generator = torch.Generator().manual_seed(1)
    up, down = torch.randn(6, 8, generator=generator), torch.randn(8, 20, generator=generator)
    expected = np.linalg.svd((up.double() @ down.double()).numpy(), compute_uv=False)
    np.testing.assert_allclose(update_spectrum(up, down)[:6].numpy(), expected, rtol=1e-6)


def test_grid_is_layers_by_kinds_in_the_models_order():
    modules = {
        "model.layers.10.self_attn.q_proj": 5,
        "model.layers.2.self_attn.q_proj": 3,
        "model.layers.2.mlp.up_proj": 8,
    }
    grid = rank_grid([{"module": name, "rank": rank} for name, rank in (modules | {"lm_head": 1}).items()])
    assert grid.layers == ["layer 2", "layer 10", "outside layers"]
    assert grid.kinds == ["q_proj", "up_proj", "lm_head"]
    assert grid.ranks == [[3, 8, None], [5, None, None], [None, None, 1]]


def test_grid_never_makes_one_name_of_two_modules():
    kinds = ["attention.output.dense", "output.dense", "attention.self.query"]
    assert rank_grid([{"module": f"encoder.layer.0.{kind}", "rank": 2} for kind in kinds]).kinds == [
        *kinds[:2],
        "query",
    ]
    stacks = [{"module": f"{stack}.block.0.q", "rank": 2} for stack in ("decoder", "encoder")]
    assert rank_grid(stacks).layers == ["decoder.block.0", "encoder.block.0"]


def test_split_module():
    assert split_module("model.layers.3.mlp.up_proj") == ("model.layers.3", "mlp.up_proj")
    assert split_module("lm_head") == ("", "lm_head")
    assert split_module("0.weight") == ("0", "weight")


def test_table_shows_every_module_and_totals(adapter):
    text = printed(*read_adapter(adapter))
    assert "model.layers.1.mlp.down_proj" in text and "4 modules" in text
    assert f"{2 * 4 * 32 + 4 * 40 + 3 * 40:,}" in text


def test_folders_that_hold_no_adapter(adapter, tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        read_ranks(tmp_path / "none")
    with pytest.raises(UserError, match=r"lacks adapter_model\.safetensors and adapter_config\.json"):
        read_ranks(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pickle"):
        read_ranks(tmp_path)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        read_ranks(adapter)


def test_broken_weights(adapter):
    save_file({"base_model.model.head.weight": torch.ones(2)}, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="no pair lora_A, lora_B"):
        read_ranks(adapter)
    (adapter / "adapter_model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="not readable as safetensors"):
        read_ranks(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match="no JSON object"):
        read_ranks(adapter)
