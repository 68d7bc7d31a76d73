"""What an export computes under the rules of those who serve it: PEFT, vLLM and llama.cpp.

PEFT is asked itself. The other two are written again here, in a few lines, from what their sources do:

vLLM, vllm-project/vllm
- vllm/lora/peft_helper.py at e745bafffc44744aa601169f8c6f325e47ca7cd5: one scaling for all modules, lora_alpha / r, or
  lora_alpha / sqrt(r) where use_rslora is set; rank_pattern and alpha_pattern are not among the fields it reads. It
  refuses modules_to_save, DoRA, a rank above max_lora_rank, and a bias.
- vllm/lora/lora_weights.py at 4c78406e054e0871688c256cfcc754bd631b508e: that scaling is multiplied into B.
- vllm/lora/lora_model.py at 0306474e9d1f26d8717aad457b9511f0c9e57d60 and vllm/lora/utils.py at
  0fd157078c53638b7ffc9ce7f2c8b8d7ef7a7d28: a tensor that is no lora_A, lora_B or lora_embedding of a module that the
  model serves is refused.
- A later text of peft_helper.py (the release that first holds it was not established) matches both patterns as PEFT
  does, and refuses more: lora_bias, starts that change the base, layer_replication and other variants.

llama.cpp, ggml-org/llama.cpp
- convert_lora_to_gguf.py at 0b03adaa632b76c7651dd1f6fa3b7a0b5eda479c: keeps lora_alpha of the config and nothing else
  about scaling; stops at a tensor that is neither A nor B.
- src/llama-adapter.h at d66c5cd4474bcdff6d569b528c4693ee6ea627fb, get_scale: alpha / rank, the rank from the shape of
  the tensor B; 1 where alpha is 0.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import rankwise as rw
import tiny
from rankwise import MiloraConfig, SoraConfig
from rankwise.ranks import gates

Config = dict[str, Any]
Deltas = dict[str, Tensor]
FACTOR = re.compile(r"base_model\.model\.(.+)\.(?:lora_([AB])\.weight|lora_embedding_([AB]))")


def read(folder: Path) -> tuple[Config, dict[str, Tensor]]:
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def pairs(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """(B, A) of each module in float64; any other tensor is an error, as it is for both servers."""
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = FACTOR.fullmatch(name)
        if not found:
            raise ValueError(f"{name} is no LoRA weight")
        halves.setdefault(found[1], {})[found[2] or found[3]] = tensor.double()
    return {name: (half["B"], half["A"]) for name, half in halves.items()}


def vllm_deltas(config: Config, tensors: dict[str, Tensor]) -> Deltas:
    """One scaling from the config's alpha and r, whatever the rank of the tensors and whatever the patterns say."""
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    return {name: (b * scaling) @ a for name, (b, a) in pairs(tensors).items()}


def later_vllm_deltas(config: Config, tensors: dict[str, Tensor]) -> Deltas:
    """A scaling for each module: the first key of a pattern that is the end of its name, from a dot on."""

    def pick(pattern: dict[str, Any], name: str, default: Any) -> Any:
        return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)

    deltas = {}
    for name, (b, a) in pairs(tensors).items():
        rank = pick(config["rank_pattern"], name, config["r"])
        alpha = pick(config["alpha_pattern"], name, config["lora_alpha"])
        deltas[name] = (b * (alpha / (math.sqrt(rank) if config["use_rslora"] else rank))) @ a
    return deltas


def llama_cpp_deltas(config: Config, tensors: dict[str, Tensor]) -> Deltas:
    """The config's alpha over each tensor's own rank; rsLoRA is not known."""
    alpha = config["lora_alpha"]
    return {name: (b * (alpha / b.shape[-1] if alpha else 1.0)) @ a for name, (b, a) in pairs(tensors).items()}


def vllm_refusals(config: Config, tensors: dict[str, Tensor], served: set[str], largest_rank: int = 16) -> list[str]:
    """Why vLLM would refuse an adapter; ``served`` are the last names of the modules it can adapt in a model."""
    allowed_starts = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
    start = config.get("init_lora_weights", True)
    whole = ("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
    reasons = [name for name in ("modules_to_save", *whole) if config.get(name)]
    reasons += ["init_lora_weights"] if isinstance(start, str) and start not in allowed_starts else []
    reasons += ["bias"] if config.get("bias", "none") != "none" else []
    reasons += (
        ["rank"] if not 0 < max([config["r"], *(config.get("rank_pattern") or {}).values()]) <= largest_rank else []
    )
    for name in tensors:
        found = FACTOR.fullmatch(name)
        if not found or found[1].rpartition(".")[2] not in served:
            reasons.append(name)
    return reasons


def peft_deltas(folder: Path, family: str = "llama") -> Deltas:
    """PEFT's own update of each layer, (out, in)."""
    model = peft.PeftModel.from_pretrained(tiny.make(family), folder).double()
    return tiny.dense_updates(model)


def same(one: Deltas, other: Deltas) -> bool:
    if one.keys() != other.keys():
        return False
    return all(float((one[name] - other[name]).norm()) < 1e-6 * float(other[name].norm()) for name in other)


def mixed_sora() -> peft.PeftModel:
    """Pruned to ranks one to four, one layer without an adapter."""
    model = tiny.adapted("llama", SoraConfig)
    for number, gate in enumerate(gates(model).values()):
        gate.data[: max(4 - number, 0)] = 0
    rw.prune(model)
    return model


PATTERNS = {"rank_pattern": {"down_proj": 7, "layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 1}}

TRAINED: dict[str, Callable[[], peft.PeftModel]] = {
    "LoRA": lambda: tiny.adapted("llama"),
    "rsLoRA": lambda: tiny.adapted("llama", use_rslora=True),
    "LoRA with patterns": lambda: tiny.adapted("llama", **PATTERNS),
    "rsLoRA with patterns": lambda: tiny.adapted("llama", use_rslora=True, **PATTERNS),
    "LoRA on an embedding": lambda: tiny.adapted("llama", target_modules=["embed_tokens", "q_proj"], **PATTERNS),
    "MiLoRA": lambda: tiny.adapted("llama", MiloraConfig),
    "MiLoRA, rsLoRA with patterns": lambda: tiny.adapted("llama", MiloraConfig, use_rslora=True, **PATTERNS),
    "SoRA": lambda: tiny.adapted("llama", SoraConfig),
    "SoRA pruned": mixed_sora,
}
MIXED = ("LoRA with patterns", "rsLoRA with patterns", "MiLoRA, rsLoRA with patterns", "SoRA pruned")
SERVED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"}


@pytest.mark.parametrize("name", TRAINED)
def test_a_uniform_export_is_the_same_function_under_every_rule(tmp_path, name):
    """And that function is the trained one, as its layers compute it."""
    model = TRAINED[name]()
    rw.export(model, tmp_path)
    trained = tiny.dense_updates(copy.deepcopy(model).double())
    read_by_peft = peft_deltas(tmp_path)
    assert same(read_by_peft, trained)
    for rule in (vllm_deltas, later_vllm_deltas, llama_cpp_deltas):
        assert same(rule(*read(tmp_path)), read_by_peft), rule.__name__


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("rank", [None, 2])
def test_vllm_refuses_no_uniform_export(tmp_path, name, rank):
    rw.export(TRAINED[name](), tmp_path, rank=rank)
    assert vllm_refusals(*read(tmp_path), SERVED) == []


@pytest.mark.parametrize("name", MIXED)
def test_the_layout_matters_where_ranks_are_mixed(tmp_path, name):
    """A compact export is right in PEFT, and in vLLM for its scaling of 1; in llama.cpp it is another function."""
    model = TRAINED[name]()
    report = rw.export(model, tmp_path, layout="compact")
    assert len(set(report.ranks.values())) > 1
    trained = tiny.dense_updates(copy.deepcopy(model).double())
    trained = {layer: update for layer, update in trained.items() if layer in report.ranks}
    for found in (peft_deltas(tmp_path), vllm_deltas(*read(tmp_path)), later_vllm_deltas(*read(tmp_path))):
        assert same(found, trained)
    largest, served = max(report.ranks.values()), llama_cpp_deltas(*read(tmp_path))
    for layer, update in trained.items():
        wrong = largest / report.ranks[layer]  # its alpha is the largest rank, its rank the layer's own
        torch.testing.assert_close(served[layer], wrong * update, rtol=1e-5, atol=1e-7)
    assert not same(served, trained)


@pytest.mark.parametrize("name", ["LoRA", "rsLoRA", "MiLoRA"])
def test_a_compact_export_of_one_rank_is_the_same_as_a_uniform_one(tmp_path, name):
    model = TRAINED[name]()
    for layout in ("compact", "uniform"):
        rw.export(model, tmp_path / layout, layout=layout)
    assert read(tmp_path / "compact")[0] == read(tmp_path / "uniform")[0]


def test_what_the_rules_make_of_an_adapter_that_is_not_exported(tmp_path):
    """Why an export is needed: PEFT's own folder of rsLoRA with patterns is three functions."""
    model = TRAINED["rsLoRA with patterns"]()
    model.save_pretrained(tmp_path)
    trained = tiny.dense_updates(copy.deepcopy(model).double())
    assert same(peft_deltas(tmp_path), trained)
    deltas = [rule(*read(tmp_path)) for rule in (vllm_deltas, llama_cpp_deltas)]
    assert not any(same(found, trained) for found in deltas) and not same(*deltas)


def test_the_refusals_see_what_they_are_to_see(tmp_path):
    rw.export(TRAINED["LoRA"](), tmp_path)
    config, tensors = read(tmp_path)
    assert vllm_refusals(config | {"use_dora": True, "bias": "all"}, tensors, SERVED) == ["use_dora", "bias"]
    assert vllm_refusals(config | {"init_lora_weights": "pissa"}, tensors, SERVED) == ["init_lora_weights"]
    assert vllm_refusals(config, tensors, SERVED, largest_rank=2) == ["rank"]
    assert len(vllm_refusals(config, tensors, SERVED - {"v_proj"})) == 4
    head = {"base_model.model.classifier.weight": torch.ones(3, 16)}
    assert vllm_refusals(config | {"modules_to_save": ["classifier"]}, head, SERVED) == ["modules_to_save", *head]
