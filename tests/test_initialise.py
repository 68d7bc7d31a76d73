from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

import rankwise as rw
import tiny
from rankwise import cli
from rankwise.directions import cache as cache_module
from rankwise.directions.model_files import ModelFiles, meta_model
from rankwise.directions.streaming import InitReport, initialise
from tiny_starts import saved, settings

FAMILIES = list(tiny.TARGETS)


@pytest.fixture
def source(tmp_path) -> Path:
    return saved(tmp_path / "source")


def begun(base: torch.nn.Module, start: Path) -> peft.PeftModel:
    config = rw.MiloraConfig.from_pretrained(start)
    return peft.PeftModel.from_pretrained(base, start, config=config, is_trainable=True)


def state(model: peft.PeftModel) -> dict[str, torch.Tensor]:
    return peft.get_peft_model_state_dict(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_a_start_on_the_loaded_model(tmp_path, family, dtype):
    """The same A, B and frozen pair to the bit, from shards; the base's function at the start; and it trains."""
    source = saved(tmp_path / "source", family, dtype, shard="6KB")
    assert len(list(source.glob("model-*.safetensors"))) > 1
    report = initialise(str(source), tmp_path / "start", settings(family))
    expected = peft.get_peft_model(tiny.make(family, dtype), settings(family))
    model = begun(tiny.make(family, dtype), tmp_path / "start")
    assert state(model).keys() == state(expected).keys()
    assert all(torch.equal(value, state(expected)[name]) for name, value in state(model).items())
    assert report.ranks == {name: 4 for name in tiny.layers(expected)}
    base = tiny.make(family, dtype)
    assert torch.equal(tiny.logits(model.eval()), tiny.logits(base))
    before = tiny.loss(model).item()
    assert tiny.loss(tiny.train(model)).item() < before


def test_the_start_is_that_part_of_the_spectrum(tmp_path, source):
    """Against numpy: s B0 A0 is the sum of the chosen triplets, and the report's energy is their share."""
    config = settings(part="principal", lora_alpha=6, use_rslora=True, rank_pattern={"down_proj": 7})
    report = initialise(str(source), tmp_path / "start", config)
    tensors = load_file(tmp_path / "start" / "adapter_model.safetensors")
    for name, rank in report.ranks.items():
        assert rank == (7 if "down_proj" in name else 4)
        weight = tiny.make("llama").get_submodule(name).weight.detach().double().numpy()
        u, s, vh = np.linalg.svd(weight, full_matrices=False)
        a = tensors[f"base_model.model.{name}.lora_A.weight"].double().numpy()
        b = tensors[f"base_model.model.{name}.lora_B.weight"].double().numpy()
        start = 6 / rank**0.5 * b[:, :rank] @ a[:rank]
        np.testing.assert_allclose(start, (u[:, :rank] * s[:rank]) @ vh[:rank], atol=1e-5 * s[0])
        np.testing.assert_array_equal(a[:rank], a[rank:])
        np.testing.assert_array_equal(b[:, :rank], -b[:, rank:])
        assert report.energy[name] == pytest.approx((s[:rank] ** 2).sum() / (s**2).sum(), rel=1e-5)


def test_loads_in_plain_peft_as_no_change(tmp_path, source):
    initialise(str(source), tmp_path / "start", settings())
    config = json.loads((tmp_path / "start" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["peft_type"], config["r"]) == ("LORA", 8)
    base = tiny.make("llama")
    expected = tiny.logits(base)
    plain = peft.PeftModel.from_pretrained(base, tmp_path / "start", config=peft.LoraConfig(**lora_fields(config)))
    torch.testing.assert_close(tiny.logits(plain), expected, atol=1e-5, rtol=1e-5)


def lora_fields(config: dict) -> dict:
    return {name: config[name] for name in ("r", "lora_alpha", "target_modules", "use_rslora")}


def test_dora_starts_with_its_magnitude(tmp_path, source):
    initialise(str(source), tmp_path / "start", settings(use_dora=True))
    expected = state(peft.get_peft_model(tiny.make("llama"), settings(use_dora=True)))
    found = state(begun(tiny.make("llama"), tmp_path / "start"))
    assert any("magnitude" in name for name in found)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_embeddings_and_tied_heads(tmp_path):
    """A tied head's weight is in the file under the embedding's name alone."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    base = LlamaForCausalLM(config).eval()
    base.save_pretrained(tmp_path / "source")
    with pytest.warns(UserWarning, match="tied layer"):
        report = initialise(str(tmp_path / "source"), tmp_path / "start", settings(target_modules=["embed_tokens"]))
    assert set(report.ranks) == {"model.embed_tokens"}
    files = ModelFiles(tmp_path / "source", meta_model(tmp_path / "source"))
    assert torch.equal(files.weight("lm_head.weight"), base.lm_head.weight)
    expected = tiny.logits(LlamaForCausalLM.from_pretrained(tmp_path / "source"))
    assert torch.equal(tiny.logits(begun(base, tmp_path / "start")), expected)


@pytest.mark.parametrize("headless", [False, True])
def test_names_may_differ_by_the_prefix_of_the_base_model(tmp_path, headless):
    """A checkpoint of the bare model serves the model with a head, and the other way round."""
    full = tiny.make("llama")
    (full.model if headless else full).save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    kind = LlamaForCausalLM if headless else LlamaModel
    path.write_text(json.dumps(config | {"architectures": [kind.__name__]}), encoding="utf-8")
    report = initialise(str(tmp_path / "source"), tmp_path / "start", settings())
    expected = peft.get_peft_model(full if headless else full.model, settings())
    assert set(report.ranks) == set(tiny.layers(expected))
    found = state(begun(tiny.make("llama") if headless else tiny.make("llama").model, tmp_path / "start"))
    assert all(torch.equal(value, state(expected)[name]) for name, value in found.items())


def test_a_zero_weight_starts_with_directions_that_can_be_trained(tmp_path):
    base = tiny.make("llama")
    base.model.layers[1].self_attn.q_proj.weight.data.zero_()
    base.save_pretrained(tmp_path / "source")
    report = initialise(str(tmp_path / "source"), tmp_path / "start", settings())
    assert report.zero == {"model.layers.1.self_attn.q_proj": 4}
    assert report.energy["model.layers.1.self_attn.q_proj"] == 0.0


def test_bfloat16_is_half_the_size_and_still_the_base(tmp_path, source):
    initialise(str(source), tmp_path / "wide", settings())
    initialise(str(source), tmp_path / "narrow", settings(), dtype=torch.bfloat16)
    wide, narrow = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("wide", "narrow"))
    assert {value.dtype for value in narrow.values()} == {torch.bfloat16}
    assert all(torch.equal(value.bfloat16(), narrow[name]) for name, value in wide.items())
    assert torch.equal(tiny.logits(begun(tiny.make("llama"), tmp_path / "narrow")), tiny.logits(tiny.make("llama")))


def stopping(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Let the decomposition fail from the one after ``after`` on."""
    real, calls = cache_module.triplets, []

    def counted(*given: object) -> object:
        calls.append(given)
        if len(calls) > after:
            raise RuntimeError("the power went off")
        return real(*given)

    monkeypatch.setattr(cache_module, "triplets", counted)


def test_interrupted_work_goes_on_from_the_cache(tmp_path, source, monkeypatch):
    config = settings(cache=str(tmp_path / "starts"))
    with monkeypatch.context() as patch:
        stopping(patch, after=4)
        with pytest.raises(RuntimeError, match="the power went off"):
            initialise(str(source), tmp_path / "start", config)
    assert not (tmp_path / "start").exists() and not list(tmp_path.glob(".start*"))
    kept = sorted((tmp_path / "starts").iterdir())
    assert len(kept) == 4
    kept[0].write_bytes(kept[0].read_bytes()[:100])
    report = initialise(str(source), tmp_path / "start", config)
    assert (len(report.ranks), report.reused, report.broken) == (6, 3, 1)
    initialise(str(source), tmp_path / "whole", settings())
    content = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("start", "whole")]
    assert content[0] == content[1]


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)


KILLED = """
import os, signal, sys
from rankwise.directions import cache
from rankwise.directions.streaming import initialise
from rankwise.directions.milora import MiloraConfig
calls, real = [], cache.write_bytes

def write(path, content):
    calls.append(path)
    if len(calls) == 3:
        path.with_name("." + path.name).write_bytes(content[:50])  # as a write that was cut off leaves it
        os.kill(os.getpid(), signal.SIGKILL)
    real(path, content)

cache.write_bytes = write
source, starts, out = sys.argv[1:]
initialise(source, out, MiloraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], cache=starts))
"""


def test_a_killed_process_leaves_whole_files_that_are_reused(tmp_path, source):
    ended = run_python(KILLED, source, tmp_path / "starts", tmp_path / "start")
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not (tmp_path / "start").exists() and len(list(tmp_path.glob(".start.*"))) == 1
    report = initialise(str(source), tmp_path / "start", settings(cache=str(tmp_path / "starts")))
    assert (report.reused, report.broken) == (2, 0) and not list(tmp_path.glob(".start.*"))


STREAMED = """
import json, sys
from pathlib import Path
import torch
from rankwise.directions import start
from rankwise.directions.streaming import initialise
from rankwise.directions.milora import MiloraConfig
from rankwise.directions.triplets import Triplets

def kilobytes(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

def cheap(weight, rank, part, seed=0):
    rows, columns = weight.shape
    return Triplets(torch.eye(rows, rank), torch.ones(rank), torch.eye(rank, columns) + weight[:1].float().sum() * 0)

start.triplets = cheap
source, out = sys.argv[1:]
config = MiloraConfig(r=16, target_modules="all-linear")
initialise(source, Path(out) / "warm", MiloraConfig(r=16, target_modules=["k_proj"]))  # what is imported late is in now
before = kilobytes("VmRSS")
report = initialise(source, Path(out) / "start", config)
print(json.dumps({"megabytes": (kilobytes("VmHWM") - before) / 1024, "matrices": len(report.ranks)}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the resident size is read as Linux tells it")
def test_memory_is_that_of_a_few_matrices(tmp_path):
    """A model of 100 MB, whose largest matrix has 3 MB, is begun in 30 MB more than an idle process has.

    The decomposition is stubbed, so that this is about what is read and written: all 56 matrices are.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8
    )
    base = LlamaForCausalLM(config)
    assert sum(parameter.nbytes for parameter in base.parameters()) > 100e6
    base.save_pretrained(tmp_path / "source", max_shard_size="20MB")
    del base
    ended = run_python(STREAMED, tmp_path / "source", tmp_path)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["matrices"] == 56
    assert found["megabytes"] < 30


def test_command_line(tmp_path, source, monkeypatch, capsys):
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    words = ["init", str(source), "--rank", "4", "--out", str(tmp_path / "start"), "--json"]
    words += ["--part", "random", "--seed", "3", "--alpha", "2", "--rslora", "--target-modules", "q_proj", "down_proj"]
    assert cli.main(words) == 0
    out, told = capsys.readouterr()
    result = json.loads(out)
    assert (len(result["ranks"]), result["reused"]) == (4, 0) and "4/4 matrices" in told
    config = rw.MiloraConfig.from_pretrained(tmp_path / "start")
    assert (config.part, config.part_seed, config.lora_alpha, config.use_rslora) == ("random", 3, 2, True)
    assert len(list((tmp_path / "cache" / "starts").iterdir())) == 4
    assert cli.main(words) == 0  # an earlier start is replaced
    assert json.loads(capsys.readouterr().out)["reused"] == 4
    assert cli.main([*words, "--no-cache"]) == 0
    assert json.loads(capsys.readouterr().out)["reused"] == 0


def test_command_line_on_the_model_that_ships(tmp_path, capsys):
    words = ["init", "embedded", "--rank", "2", "--target-modules", "v_proj", "--out", str(tmp_path / "start")]
    assert cli.main([*words, "--no-cache", "--dtype", "bfloat16"]) == 0
    assert "5 matrices" in capsys.readouterr().out
    base = AutoModelForCausalLM.from_pretrained(cli_folder(), dtype=torch.bfloat16)
    expected = tiny.logits(base)
    assert torch.equal(tiny.logits(begun(base, tmp_path / "start")), expected)


def test_command_line_with_patterns_and_magnitudes(tmp_path, source, capsys):
    words = ["init", str(source), "--rank", "4", "--out", str(tmp_path / "start"), "--no-cache", "--dora", "--exclude"]
    words += [
        "lm_head",
        "q_proj",
        "--rank-pattern",
        "v_proj=2",
        "layers.1.mlp.down_proj=7",
        "--alpha-pattern",
        "up_proj=3",
        "k_proj=1.5",
    ]
    assert cli.main([*words, "--json"]) == 0
    ranks = json.loads(capsys.readouterr().out)["ranks"]
    assert len(ranks) == 12 and not any(name.endswith("q_proj") for name in ranks)
    assert (ranks["model.layers.0.self_attn.v_proj"], ranks["model.layers.1.mlp.down_proj"]) == (2, 7)
    config = rw.MiloraConfig.from_pretrained(tmp_path / "start")
    assert (config.use_dora, config.alpha_pattern) == (True, {"up_proj": 3, "k_proj": 1.5})
    with pytest.raises(SystemExit):
        cli.main([*words, "v_proj=many"])
    assert "'v_proj=many' is no NAME=NUMBER" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["embedded", "relative"])
def test_the_base_is_named_as_the_user_named_it(tmp_path, source, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    model = "embedded" if given == "embedded" else "./source"
    initialise(model, tmp_path / "start", settings(target_modules=["v_proj"]))
    written = json.loads((tmp_path / "start" / "adapter_config.json").read_text(encoding="utf-8"))
    assert written["base_model_name_or_path"] == model
    assert rw.MiloraConfig.from_pretrained(tmp_path / "start").base_model_name_or_path == model


def cli_folder() -> Path:
    from rankwise.models import EMBEDDED_FOLDER

    return EMBEDDED_FOLDER


def test_nothing_is_shown_without_a_console(tmp_path, source, capsys):
    report = initialise(str(source), tmp_path / "start", settings())
    assert isinstance(report, InitReport) and report.seconds > 0
    assert capsys.readouterr() == ("", "")
    console = Console(record=True, width=100)
    initialise(str(source), tmp_path / "start", settings(), console=console)
    assert "6/6 matrices" in console.export_text()


def test_a_hub_id_is_read_from_its_snapshot(tmp_path, source, monkeypatch):
    from rankwise.directions import model_files

    asked = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(source)

    monkeypatch.setattr(model_files, "snapshot_download", snapshot)
    assert len(initialise("oak/tree", tmp_path / "start", settings()).ranks) == 6
    written = json.loads((tmp_path / "start" / "adapter_config.json").read_text(encoding="utf-8"))
    assert written["base_model_name_or_path"] == "oak/tree"
    assert asked[0][0] == "oak/tree" and not any("bin" in pattern for pattern in asked[0][1])
