"""The errors in the report are those of the files: dense updates of the trained model against dense products read."""

from __future__ import annotations

import copy
import io
import json
import math
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig
from rich.console import Console
from safetensors.numpy import load_file

import rankwise as rw
import tiny
from rankwise import MiloraConfig, SoraConfig
from rankwise.evaluation import print_export
from rankwise.low_rank import balanced_svd, distance, kept_rank, product_norm
from rankwise.peft_bridge import matrix_factors
from rankwise.ranks import gates

# MiLoRA's and SoRA's factors are computed in the adapter's float32 before they are decomposed in float64.
FACTORS = 2e-7


def exact_updates(model: peft.PeftModel) -> dict[str, np.ndarray]:
    """What each layer adds to its base, (out, in), computed by the layers themselves in float64."""
    return {name: update.numpy() for name, update in tiny.dense_updates(copy.deepcopy(model).double()).items()}


def written_updates(folder: Path) -> dict[str, np.ndarray]:
    """Dense products of the factors in a written file, scaled as its config says for each layer."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key, a in tensors.items():
        for kind in (".lora_A.weight", ".lora_embedding_A"):
            if key.endswith(kind):
                name = key.removeprefix("base_model.model.").removesuffix(kind)
                b = tensors[key.replace("_A", "_B")]
                assert a.dtype == b.dtype == np.float32
                scaling = config["alpha_pattern"].get(name, config["lora_alpha"]) / len(a)
                found[name] = scaling * (b.astype(np.float64) @ a.astype(np.float64))
    return found


@pytest.mark.parametrize("layout", ["uniform", "compact"])
@pytest.mark.parametrize("settings", [{}, {"rank": 2}, {"energy": 0.8}, {"rank": 3, "energy": 0.95}], ids=str)
@pytest.mark.parametrize(
    ("family", "config"),
    [("llama", LoraConfig), ("llama", MiloraConfig), ("gpt2", MiloraConfig), ("llama", SoraConfig)],
)
def test_errors_in_the_report_are_those_of_the_file(tmp_path, family, config, settings, layout):
    model = tiny.adapted(family, config)
    exact = exact_updates(model)
    report = rw.export(model, tmp_path / "adapter", layout=layout, **settings)
    written = written_updates(tmp_path / "adapter")
    assert report.module_errors.keys() == exact.keys() == written.keys()
    lost = {name: np.linalg.norm(exact[name] - written[name]) for name in exact}
    norms = {name: np.linalg.norm(update) for name, update in exact.items()}
    for name, error in report.module_errors.items():
        assert error == pytest.approx(lost[name] / norms[name], rel=1e-6, abs=FACTORS)
    whole = math.hypot(*lost.values()) / math.hypot(*norms.values())
    assert report.relative_error == pytest.approx(whole, rel=1e-6, abs=FACTORS)
    assert 1e-9 < whole < 1e-6 if not settings else whole > 1e-2


@pytest.mark.parametrize("config", [LoraConfig, MiloraConfig, SoraConfig])
def test_rounding_alone_is_measured_too(tmp_path, config):
    """Where nothing is cut the errors are of float32's size, and are those of the file, in numpy's float64."""
    model = tiny.adapted("llama", config)
    report = rw.export(model, tmp_path / "adapter")
    for name, product in written_updates(tmp_path / "adapter").items():
        layer = tiny.layers(model)[name]
        b, a = (factor.double().numpy() for factor in matrix_factors(layer, "default", name))
        exact = layer.scaling["default"] * (b @ a)
        lost = np.linalg.norm(exact - product) / np.linalg.norm(exact)
        assert lost > 1e-9
        assert report.module_errors[name] == pytest.approx(lost, rel=1e-4, abs=0)


@pytest.mark.parametrize("config", [LoraConfig, MiloraConfig, SoraConfig])
@pytest.mark.parametrize("layout", ["uniform", "compact"])
def test_the_whole_update_is_lost_to_rounding_alone(tmp_path, config, layout):
    """At the update's own rank (2r for MiLoRA) every layer is exact to the rounding of float32."""
    model = tiny.adapted("llama", config, use_rslora=True, target_modules=["embed_tokens", "q_proj", "down_proj"])
    exact = exact_updates(model)
    rw.export(model, tmp_path / "adapter", layout=layout)
    for name, update in written_updates(tmp_path / "adapter").items():
        assert np.linalg.norm(exact[name] - update) < 1e-6 * np.linalg.norm(exact[name])


def test_the_worst_layers_come_first_and_zero_updates_lose_nothing(tmp_path):
    model = tiny.adapted("llama", SoraConfig)
    dead = next(iter(gates(model)))
    gates(model)[dead].data.zero_()
    report = rw.export(model, tmp_path / "adapter", rank=1)
    errors = [error for _, error in report.worst(len(report.module_errors))]
    assert errors == sorted(report.module_errors.values(), reverse=True)
    assert report.worst(1) == [(name, error) for name, error in report.module_errors.items() if error == errors[0]]
    assert report.module_errors[dead] == 0 and dead not in report.ranks
    assert len(report.worst()) == 3


def test_an_untrained_adapter_has_no_error(tmp_path):
    model = peft.get_peft_model(tiny.make("llama"), LoraConfig(r=4, target_modules=["q_proj"]))
    report = rw.export(model, tmp_path / "adapter")
    assert report.relative_error == 0 and set(report.module_errors.values()) == {0.0}


def test_the_command_prints_the_error_and_the_worst_layers():
    errors = {"a": 0.01, "b": 0.5, "c": 0.25, "d": 0.0, "e": 0.3}
    console = Console(record=True, width=100, file=io.StringIO())
    print_export(Path("small"), rw.ExportReport({"a": 1}, 0.125, 12_345, errors), console)
    assert console.export_text().splitlines() == [
        "small: 12,345 parameters, relative error 1.25e-01",
        "largest of 5 modules:",
        "  b 5.00e-01",
        "  e 3.00e-01",
        "  c 2.50e-01",
    ]


def factors(rank: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    return torch.randn(9, rank, **draw), torch.randn(rank, 7, **draw)


@pytest.mark.parametrize("rank", [1, 3, 7, 12])
def test_products_against_dense_ones(rank):
    """Factors of more columns than the product has rank are no special case."""
    (b, a), (c, d) = factors(rank), factors(2, seed=1)
    u, s, vh = balanced_svd(b, a)
    np.testing.assert_allclose(s, np.linalg.svd((b @ a).numpy(), compute_uv=False)[: len(s)], atol=1e-12)
    torch.testing.assert_close((u * s) @ vh, b @ a)
    assert kept_rank(s) == min(rank, 7)
    assert product_norm(b, a) == pytest.approx(np.linalg.norm((b @ a).numpy()), rel=1e-12)
    assert distance((b, a), (c, d)) == pytest.approx(np.linalg.norm((b @ a - c @ d).numpy()), rel=1e-12)
    assert distance((b, a), (b, a)) < 1e-12
