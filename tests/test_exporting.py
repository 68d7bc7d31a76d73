from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn

import rankwise as rw
import tiny
from conftest import DATA
from rankwise import MiloraConfig, SoraConfig
from rankwise.errors import UserError
from rankwise.ranks import gates

# Runs in a process of its own: plain peft and transformers, on the base as it was saved.
ELSEWHERE = """
import json, sys, traceback, torch, transformers, peft
from safetensors.torch import save_file
torch.set_num_threads(1)
found, failed = {}, {}

def logits(case):
    kind = transformers.AutoModelForSequenceClassification if case["labels"] else transformers.AutoModelForCausalLM
    extra = {"num_labels": 3} if case["labels"] else {}
    model = kind.from_pretrained(case["base"], dtype=torch.float32, **extra).eval()
    if case["adapter"]:
        model = peft.PeftModel.from_pretrained(model, case["adapter"]).eval()
        assert type(model.peft_config["default"]) is peft.LoraConfig
    with torch.no_grad():
        return model(input_ids=torch.tensor(case["ids"])).logits.contiguous()

for case in json.load(open(sys.argv[1])):
    try:
        found[case["name"]] = logits(case)
    except Exception:
        failed[case["name"]] = traceback.format_exc()
assert "rankwise" not in sys.modules
save_file(found, sys.argv[2])
print(json.dumps(failed))
"""


def partly_dead(config_settings: dict, pruned: bool = False) -> peft.PeftModel:
    """SoRA whose first layer has no live gate, and the others one to four."""
    model = tiny.adapted("llama", SoraConfig, **config_settings)
    for number, gate in enumerate(gates(model).values()):
        gate.data[: max(4 - number, 0)] = 0
    if pruned:
        rw.prune(model)
    return model


def all_dead() -> peft.PeftModel:
    model = tiny.adapted("llama", SoraConfig)
    for gate in gates(model).values():
        gate.data.zero_()
    return model


def untrained() -> peft.PeftModel:
    return peft.get_peft_model(tiny.make("llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


def with_biases() -> peft.PeftModel:
    """One layer's update is zero, and its trained bias is not."""
    model = tiny.adapted("bert", SoraConfig, bias="lora_only")
    next(iter(gates(model).values())).data.zero_()
    return model


def pretrained() -> peft.PeftModel:
    return tiny.train(peft.get_peft_model(tiny.real(DATA), MiloraConfig(r=4, target_modules="all-linear")), 1)


RSLORA = {"use_rslora": True, "rank_pattern": {"down_proj": 7, "layers.1.self_attn.q_proj": 2}}
CLASSES = {"task_type": "SEQ_CLS"}

# name: (how to make the trained model, settings of the export)
CASES: dict[str, tuple[Callable[[], peft.PeftModel], dict]] = {
    **{
        f"{family} {config.__name__} {layout}": (
            lambda family=family, config=config: tiny.adapted(family, config),
            {"layout": layout},
        )
        for family in ("llama", "gpt2")
        for config in (LoraConfig, MiloraConfig, SoraConfig)
        for layout in ("uniform", "compact", "merged")
    },
    "embedding": (lambda: tiny.adapted("llama", target_modules=["embed_tokens", "q_proj"]), {}),
    "embedding compact": (
        lambda: tiny.adapted("llama", target_modules=["embed_tokens", "q_proj"]),
        {"layout": "compact"},
    ),
    "rslora": (lambda: tiny.adapted("llama", **RSLORA), {}),
    "rslora compact": (lambda: tiny.adapted("llama", **RSLORA), {"layout": "compact"}),
    "rslora MiLoRA": (lambda: tiny.adapted("llama", MiloraConfig, **RSLORA), {"layout": "compact"}),
    "rslora SoRA": (lambda: partly_dead(RSLORA), {"layout": "compact"}),
    "alpha pattern": (lambda: tiny.adapted("llama", alpha_pattern={"v_proj": 1}), {}),
    "classifier": (lambda: tiny.adapted("bert", MiloraConfig, **CLASSES), {}),
    "classifier SoRA": (lambda: tiny.adapted("bert", SoraConfig, **CLASSES), {"layout": "compact"}),
    "partly dead": (lambda: partly_dead({}), {}),
    "partly dead compact": (lambda: partly_dead({}), {"layout": "compact"}),
    "pruned": (lambda: partly_dead({}, pruned=True), {}),
    "all dead": (all_dead, {}),
    "all dead compact": (all_dead, {"layout": "compact"}),
    "untrained": (untrained, {}),
    "biases": (with_biases, {}),
    "trained tokens": (lambda: tiny.adapted("llama", trainable_token_indices=[5, 7]), {}),
}
if DATA.is_dir():
    CASES["pretrained"] = (pretrained, {})
    CASES["pretrained compact"] = (pretrained, {"layout": "compact"})


@dataclass
class Exported:
    folder: Path
    report: rw.ExportReport
    here: torch.Tensor
    base: torch.Tensor
    elsewhere: torch.Tensor | None
    failure: str | None
    adapted: set[str]


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, Exported]:
    """Every case, exported here and read by one other process."""
    root = tmp_path_factory.mktemp("exported")
    tasks, made = [], {}
    for number, (name, (build, settings)) in enumerate(CASES.items()):
        model = build().eval()
        folder, base = root / f"case{number}", root / f"base{number}"
        here = tiny.logits(model)
        names = set(tiny.layers(model))
        report = rw.export(model, folder, **settings)
        assert torch.equal(tiny.logits(model), here), f"{name}: the export changed the model"
        untouched = tiny.real(DATA) if name.startswith("pretrained") else tiny.make(family_of(model))
        untouched.save_pretrained(base)
        merged = settings.get("layout") == "merged"
        tasks.append(
            {
                "name": name,
                "base": str(folder if merged else base),
                "adapter": None if merged else str(folder),
                "ids": tiny.IDS.tolist(),
                "labels": family_of(model) == "bert",
            }
        )
        made[name] = (folder, report, here, tiny.logits(untouched), names)
    (root / "tasks.json").write_text(json.dumps(tasks))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", ELSEWHERE, root / "tasks.json", root / "found.safetensors"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found, failed = load_file(root / "found.safetensors"), json.loads(done.stdout.splitlines()[-1])
    return {
        name: Exported(folder, report, here, base, found.get(name), failed.get(name), names)
        for name, (folder, report, here, base, names) in made.items()
    }


def family_of(model: peft.PeftModel) -> str:
    return model.get_base_model().config.model_type


@pytest.mark.parametrize("name", CASES)
def test_computes_the_same_elsewhere(exported, name):
    case = exported[name]
    assert case.failure is None, case.failure
    torch.testing.assert_close(case.elsewhere, case.here, atol=1e-4, rtol=0)
    moved = float((case.here - case.base).abs().max())
    assert moved < 1e-6 if name in ("all dead", "all dead compact", "untrained") else moved > 1e-2
    merged = CASES[name][1].get("layout") == "merged"  # float32 rounds the sum of weight and update
    assert case.report.relative_error < (1e-5 if merged else 1e-7)


@pytest.mark.parametrize("name", [name for name, (_, settings) in CASES.items() if "layout" not in settings])
def test_uniform_has_one_rank_and_scaling_one(exported, name):
    case = exported[name]
    config = json.loads((case.folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == config["lora_alpha"] == max(case.report.ranks.values())
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    assert not config["use_rslora"] and not config["use_dora"] and config["inference_mode"]
    factors = {
        key: value.shape
        for key, value in load_file(case.folder / "adapter_model.safetensors").items()
        if ".lora_" in key
    }
    assert {min(shape) for shape in factors.values()} == {config["r"]}
    assert len(factors) == 2 * len(case.report.ranks)
    assert sum(a * b for a, b in factors.values()) == case.report.parameters


def test_ranks_as_written(exported):
    """LoRA keeps its rank; MiLoRA has up to twice as much; dead gates count for nothing."""
    assert set(exported["llama LoraConfig uniform"].report.ranks.values()) == {4}
    assert set(exported["llama MiloraConfig uniform"].report.ranks.values()) == {8}
    assert list(exported["partly dead"].report.ranks.values()) == [1, 2, 3, 4, 4]
    assert list(exported["pruned"].report.ranks.values()) == [1, 2, 3, 4, 4]
    assert len(exported["all dead"].report.ranks) == len(exported["untrained"].report.ranks) == 1
    ranks = exported["rslora compact"].report.ranks
    assert ranks["model.layers.0.mlp.down_proj"] == 7 and ranks["model.layers.1.self_attn.q_proj"] == 2


def test_compact_writes_each_rank_and_fewer_numbers(exported):
    compact, uniform = exported["partly dead compact"], exported["partly dead"]
    config = json.loads((compact.folder / "adapter_config.json").read_text())
    uneven = {name: rank for name, rank in compact.report.ranks.items() if rank != 4}
    assert config["rank_pattern"] == config["alpha_pattern"] == uneven and len(uneven) == 3
    assert compact.report.parameters < uniform.report.parameters
    tensors = load_file(compact.folder / "adapter_model.safetensors")
    assert sum(value.numel() for value in tensors.values()) == compact.report.parameters


def test_layers_without_an_update_are_left_out(exported):
    for name in ("partly dead", "partly dead compact"):
        case = exported[name]
        assert case.adapted - set(case.report.ranks) == {"model.layers.0.self_attn.q_proj"}
        keys = load_file(case.folder / "adapter_model.safetensors")
        assert not any("layers.0.self_attn.q_proj" in key for key in keys)


def test_target_modules_are_the_short_names_where_these_say_it(exported):
    def targets(name: str) -> list[str]:
        return json.loads((exported[name].folder / "adapter_config.json").read_text())["target_modules"]

    assert sorted(targets("llama MiloraConfig uniform")) == sorted(tiny.TARGETS["llama"])
    assert sorted(targets("partly dead")) == sorted(exported["partly dead"].report.ranks)


def test_a_trained_head_is_carried(exported):
    tensors = load_file(exported["classifier"].folder / "adapter_model.safetensors")
    head = tensors["base_model.model.classifier.weight"]
    assert head.shape == (3, 16)
    assert not torch.equal(head, tiny.make("bert").classifier.weight)
    assert (
        "classifier"
        in json.loads((exported["classifier"].folder / "adapter_config.json").read_text())["modules_to_save"]
    )


def test_what_the_config_says_beside_the_ranks(exported):
    def config(name: str) -> dict:
        return json.loads((exported[name].folder / "adapter_config.json").read_text())

    assert config("gpt2 MiloraConfig uniform")["fan_in_fan_out"] is True
    assert config("biases")["bias"] == "lora_only"
    assert config("classifier")["task_type"] == "SEQ_CLS"


def test_merged_is_a_whole_model(exported):
    case = exported["gpt2 SoraConfig merged"]
    assert not (case.folder / "adapter_config.json").exists()
    assert case.report.parameters == sum(p.numel() for p in tiny.make("gpt2").parameters())


def reloaded(folder: Path, family: str = "llama") -> peft.PeftModel:
    return peft.PeftModel.from_pretrained(tiny.make(family), folder)


@pytest.mark.parametrize("layout", ["uniform", "compact"])
@pytest.mark.parametrize(
    "settings", [{"rank": 2}, {"energy": 0.9}, {"rank": 3, "energy": 0.99}, {"energy": 1.0}], ids=str
)
@pytest.mark.parametrize("config", [MiloraConfig, SoraConfig])
def test_cuts_are_the_best_and_their_error_is_known(tmp_path, config, settings, layout):
    """Against numpy's decomposition of the dense updates: rank, error of each layer, and error of the whole."""
    model = tiny.adapted("llama", config, use_rslora=True)
    dense = {name: update.numpy() for name, update in tiny.dense_updates(model).items()}
    report = rw.export(model, tmp_path / "adapter", layout=layout, **settings)
    written = {name: update.numpy() for name, update in tiny.dense_updates(reloaded(tmp_path / "adapter")).items()}
    lost = whole = 0.0
    for name, update in dense.items():
        squares = np.linalg.svd(update, compute_uv=False) ** 2
        rank = report.ranks[name]
        assert rank <= settings.get("rank", 8)
        share, without_last = squares[:rank].sum() / squares.sum(), squares[: rank - 1].sum() / squares.sum()
        energy = settings.get("energy", 1.0)
        assert without_last < energy
        assert rank == settings.get("rank") or share > energy - 1e-6
        error = ((update - written[name]) ** 2).sum()
        assert error == pytest.approx(squares[rank:].sum(), rel=1e-3, abs=1e-9)
        lost, whole = lost + error, whole + squares.sum()
    assert report.relative_error == pytest.approx(np.sqrt(lost / whole), rel=1e-3, abs=2e-6)
    assert (report.relative_error > 1e-3) == (settings != {"energy": 1.0})


def test_a_layer_with_a_larger_update_is_not_cut_more_than_another(tmp_path):
    """Energy is a share of each layer's own update: scaling one layer's changes no rank."""
    model = tiny.adapted("llama")
    before = rw.export(model, tmp_path / "a", energy=0.9).ranks
    next(iter(tiny.layers(model).values())).lora_B["default"].weight.data *= 1e-3
    assert rw.export(model, tmp_path / "b", energy=0.9).ranks == before


def test_the_chosen_adapter_is_the_active_one(tmp_path):
    model = tiny.adapted("llama", MiloraConfig)
    model.add_adapter("second", MiloraConfig(r=2, target_modules=["k_proj"]))
    model.set_adapter("second")
    tiny.train(model)
    report = rw.export(model, tmp_path / "second")
    assert set(report.ranks) == {f"model.layers.{i}.self_attn.k_proj" for i in (0, 1)}
    torch.testing.assert_close(tiny.logits(reloaded(tmp_path / "second")), tiny.logits(model), atol=1e-5, rtol=0)


class Nested(nn.Module):
    """One module's whole name is the end of another's, and no transformers model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 6)
        self.block = nn.ModuleDict({"first": nn.Linear(6, 6)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block["first"](torch.tanh(self.first(x)))


@pytest.mark.parametrize("layout", ["uniform", "compact"])
@pytest.mark.parametrize("dead", [{"first": 3}, {"block.first": 3}, {"block.first": 4}, {"first": 4}])
def test_names_that_end_alike(tmp_path, layout, dead):
    torch.manual_seed(1)
    model = peft.get_peft_model(Nested(), SoraConfig(r=4, target_modules=["first"], init_lora_weights=False))
    for name, number in dead.items():
        gates(model)[name].data[:number] = 0
    x = torch.randn(5, 6)
    rw.export(model, tmp_path / "adapter", layout=layout)
    loaded = peft.PeftModel.from_pretrained(Nested(), tmp_path / "adapter")
    assert len(tiny.layers(loaded)) == (1 if 4 in dead.values() else 2)
    torch.testing.assert_close(loaded(x), model(x), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="'merged' writes models of transformers, not Nested"):
        rw.export(model, tmp_path / "merged", layout="merged")
