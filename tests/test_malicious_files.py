"""What a malicious file comes to: whatever its name is, none that is read can run code."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import PreTrainedTokenizerFast

import small_runs
import test_milora_trainers as trainers
import tiny
import tiny_starts
from rankwise.adapters import load_adapter_folder
from rankwise.analysis.ranks import read_ranks
from rankwise.cli import main
from rankwise.directions import initialise, load_checkpoint
from rankwise.directions.cache import StartCache, start_key
from rankwise.directions.triplets import triplets
from rankwise.errors import UserError
from rankwise.files import MANIFEST
from rankwise.methods.listing import method_rows
from rankwise.models import EMBEDDED_FOLDER, context_limit, load_language_model, load_tokenizer
from rankwise.preferences.reference_cache import ReferenceCache
from rankwise.recipes import make_recipe
from rankwise.recommend import InteractionSettings, prepare_interactions
from rankwise.recommend.store import HISTORIES, TITLES, read_store
from rankwise.run import Run
from rankwise.schema import ModelSettings
from rankwise.tasks.load import load_task

# A pickle under every name that is read


class Payload:
    """An object whose pickle makes a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open, (str(self.marker), "w")


class Attack:
    """A malicious pickle, and the file that is there once it has been read."""

    def __init__(self, folder: Path) -> None:
        self.marker = folder / "the-pickle-was-run"

    def write(self, path: Path) -> None:
        """Put the pickle where another file may be: as torch writes one where it would be torch's, else by itself.

        The manifest is removed, as who attacks does: that of a changed file is refused before anything is looked at.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        (path.parent / MANIFEST).unlink(missing_ok=True)
        if path.suffix in (".bin", ".pt", ".pth"):
            torch.save(Payload(self.marker), path)
        else:
            path.write_bytes(pickle.dumps(Payload(self.marker)))

    def refused(self, read: Callable[..., Any], *arguments: Any, match: str = "") -> None:
        with pytest.raises(UserError, match=match):
            read(*arguments)
        assert not self.marker.exists()


@pytest.fixture
def attack(tmp_path: Path) -> Attack:
    return Attack(tmp_path)


def test_the_attack_works_on_who_reads_pickles(attack: Attack, tmp_path: Path) -> None:
    attack.write(tmp_path / "file.bin")
    torch.load(tmp_path / "file.bin", weights_only=False)
    assert attack.marker.exists()
    attack.marker.unlink()
    attack.write(tmp_path / "file")
    pickle.loads((tmp_path / "file").read_bytes())
    assert attack.marker.exists()


PICKLES = [("adapter_model.bin", "adapter_model.bin is a pickle"), ("adapter_model.safetensors", "cannot be read")]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MiLoRA adapter, beside its base."""
    folder = tmp_path_factory.mktemp("adapter")
    tiny.make("llama").save_pretrained(folder / "base")
    initialise(str(folder / "base"), folder / "adapter", tiny_starts.settings())
    return folder


@pytest.mark.parametrize(("name", "message"), PICKLES)
def test_adapters(attack: Attack, tmp_path: Path, adapter: Path, name: str, message: str) -> None:
    folder = shutil.copytree(adapter / "adapter", tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    attack.write(folder / name)
    base = str(adapter / "base")
    attack.refused(load_adapter_folder, folder, base, match=message)
    attack.refused(load_checkpoint, tiny.make("llama"), folder, match=message)
    attack.refused(lambda: load_checkpoint(tiny.make("llama"), tmp_path, subfolder="adapter"), match=message)
    attack.refused(load_checkpoint, load_checkpoint(tiny.make("llama"), adapter / "adapter"), folder, "second")
    attack.refused(read_ranks, folder, match="pickle|not readable as safetensors")
    (folder / "milora.json").unlink()
    attack.refused(load_adapter_folder, folder, base, match=message)
    assert main(["export", str(folder), str(tmp_path / "out"), "--model", base]) == 2
    assert main(["inspect", str(folder)]) == 2
    assert not attack.marker.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["adapters", "shadow_model", "prompt_tuning_init_state_dict_path"])
def test_adapters_that_name_other_files(attack: Attack, tmp_path: Path, adapter: Path, name: str) -> None:
    folder = shutil.copytree(adapter / "adapter", tmp_path / "adapter")
    (folder / MANIFEST).unlink()
    change(folder / "adapter_config.json", **{name: str(tmp_path / "elsewhere.bin")})
    attack.refused(load_adapter_folder, folder, str(adapter / "base"), match=f"has {name} '.*elsewhere.bin' loaded too")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_base_models(attack: Attack, tmp_path: Path, adapter: Path, model_folder: Path, name: str) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "base")
    (folder / "model.safetensors").unlink()
    attack.write(folder / name)
    attack.refused(load_language_model, ModelSettings(path=str(folder)), match=r"model.path .* cannot be loaded")
    attack.refused(load_adapter_folder, adapter / "adapter", str(folder))
    attack.refused(initialise, str(folder), tmp_path / "start", tiny_starts.settings())


@pytest.mark.parametrize("name", ["adapter_model.bin", "other.safetensors.index.json", "other.safetensors"])
def test_base_models_that_name_another_file_of_weights(
    attack: Attack, tmp_path: Path, adapter: Path, model_folder: Path, name: str
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "base")
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    torch.save(tiny.make("llama").state_dict(), folder / "adapter_model.bin")
    change(folder / "config.json", transformers_weights=name)
    message = f"config.json has transformers_weights '{name}'"
    attack.refused(load_language_model, ModelSettings(path=str(folder)), match=message)
    attack.refused(load_adapter_folder, adapter / "adapter", str(folder), match=message)
    attack.refused(initialise, str(folder), tmp_path / "start", tiny_starts.settings(), match=message)


SECRETS = {name: f"a-secret-of-{name.lower()}" for name in ("RANKWISE_TOKEN", "HF_TOKEN", "WANDB_API_KEY")}


@pytest.fixture(scope="module")
def finished(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on interactions with one stage, by somebody whose environment has secrets."""
    folder = tmp_path_factory.mktemp("finished")
    values = small_runs.values("interactions", folder, model_folder, stages=[small_runs.SFT | {"epochs": 1}])
    with pytest.MonkeyPatch.context() as patch:
        for name, secret in SECRETS.items():
            patch.setenv(name, secret)
        Run(make_recipe(values), small_runs.silent())()
    return folder / "run"


def test_a_run_keeps_no_secret(finished: Path) -> None:
    files = [path for path in finished.rglob("*") if path.is_file()]
    assert {"results.json", "report.html", "versions.json"} <= {path.name for path in files}
    for path in files:
        assert not any(secret.encode() in path.read_bytes() for secret in SECRETS.values()), path


@pytest.mark.parametrize(("name", "message"), PICKLES)
def test_a_stage_of_a_run(
    attack: Attack, tmp_path: Path, finished: Path, name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    for folder in (run / "stages" / "sft", run / "adapter"):
        (folder / "adapter_model.safetensors").unlink()
        attack.write(folder / name)
    for words in (["export", run, tmp_path / "out"], ["evaluate", run], ["recommend", run, "--user", "u1"]):
        assert main([str(word) for word in words]) == 2, words
        assert message in capsys.readouterr().err
        assert not attack.marker.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_stage_that_holds_a_whole_model(attack: Attack, tmp_path: Path, tiny_llama: Any, name: str) -> None:
    from rankwise.methods import load_stage, save_stage
    from rankwise.methods.in_place import train_all

    model = train_all(tiny_llama)
    save_stage(model, tmp_path / "stage")
    (tmp_path / "stage" / "model.safetensors").unlink()
    attack.write(tmp_path / "stage" / name)
    attack.refused(load_stage, model, tmp_path / "stage")


@pytest.mark.parametrize("name", [TITLES, HISTORIES])
def test_the_store_of_a_run(attack: Attack, tmp_path: Path, finished: Path, name: str) -> None:
    store = shutil.copytree(finished / "store", tmp_path / "store")
    attack.write(store / name)
    attack.refused(read_store, store, match="is not readable as Parquet")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_of_transformers_trainer(attack: Attack, tmp_path: Path, name: str) -> None:
    model = peft.get_peft_model(tiny.make("llama"), trainers.milora())
    trainers.trainer(model, tmp_path, 2).train()
    attack.write(tmp_path / "checkpoint-2" / name)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        trainers.trainer(model, tmp_path, 4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not attack.marker.exists()


# Caches


def test_a_cached_start_is_computed_again_and_counted(attack: Attack, tmp_path: Path) -> None:
    weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    attack.write(tmp_path / "starts" / f"{start_key(weight, 3, 'minor')}.safetensors")
    cache = StartCache(tmp_path / "starts")
    found = cache.triplets(weight, 3, "minor")
    assert all(torch.equal(one, other) for one, other in zip(found, triplets(weight, 3, "minor"), strict=True))
    assert (cache.broken, cache.reused) == (1, 0)
    assert not attack.marker.exists()


def test_cached_log_probabilities(attack: Attack, tmp_path: Path) -> None:
    attack.write(tmp_path / "cache" / "abc.safetensors")
    attack.refused(ReferenceCache, tmp_path / "cache", "abc", match="cannot be read, or is cut off or damaged")


# Data


@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz", "log.tsv", "log.jsonl", "log.parquet", "log.arrow"])
@pytest.mark.parametrize("part", ["interactions", "items"])
def test_interactions(attack: Attack, tmp_path: Path, part: str, name: str) -> None:
    files = small_runs.interactions(tmp_path)
    attack.write(tmp_path / name)
    places = {key: Path(files[key]) for key in ("interactions", "items")} | {part: tmp_path / name}
    settings = InteractionSettings(ratings=places["interactions"], items=places["items"])
    attack.refused(prepare_interactions, settings)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet", "txt"])
@pytest.mark.parametrize("kind", ["text", "instructions", "maths", "preferences", "classification", "sdpo"])
def test_rows_of_a_task(
    attack: Attack, tmp_path: Path, model_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast, kind: str, suffix: str
) -> None:
    values = small_runs.values(kind, tmp_path, model_folder)
    attack.write(tmp_path / f"rows.{suffix}")
    values["data"]["train"] = str(tmp_path / f"rows.{suffix}")
    attack.refused(lambda: load_task(make_recipe(values), tiny_tokenizer, 128))


# Models that bring code


@pytest.fixture
def coded(attack: Attack, tmp_path: Path) -> Callable[[str], Path]:
    """Makes a model whose files name Python files of its own, which make the marker."""

    def make(kind: str) -> Path:
        folder = shutil.copytree(EMBEDDED_FOLDER, tmp_path / kind)
        code = f"open({str(attack.marker)!r}, 'w')\nclass Own: pass\n"
        (folder / "custom_generate").mkdir()
        for name in ("own.py", "custom_generate/generate.py"):
            (folder / name).write_text(code, encoding="utf-8")
        classes = {name: "own.Own" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")}
        change(folder / "config.json", model_type=kind, auto_map=classes)
        change(folder / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own"] * 2})
        return folder

    return make


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def unasked(*_: object) -> str:
    raise AssertionError("a person was asked whether to run the code")


def test_a_model_that_needs_its_own_code_is_refused(
    attack: Attack, tmp_path: Path, coded: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", unasked)
    folder, message = coded("unheard-of"), "it needs Python code from its own files, which is never run"
    settings = ModelSettings(path=str(folder))
    attack.refused(load_language_model, settings, match=message)
    attack.refused(load_tokenizer, str(folder), match=message)
    attack.refused(context_limit, settings, load_tokenizer("embedded"), match=message)
    attack.refused(method_rows, str(folder), match=message)
    attack.refused(initialise, str(folder), tmp_path / "start", tiny_starts.settings(), match=message)
    initialise("embedded", tmp_path / "adapter", tiny_starts.settings(target_modules=["v_proj"]))
    attack.refused(load_adapter_folder, tmp_path / "adapter", str(folder), match=message)


def test_transformers_own_model_is_taken_in_place_of_a_models_code(
    attack: Attack, coded: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", unasked)
    folder = coded("llama")
    model = load_language_model(ModelSettings(path=str(folder)))
    assert type(model).__module__.startswith("transformers.models.llama")
    model.generate(torch.tensor([[1, 2]]), max_new_tokens=1)
    assert not attack.marker.exists()
