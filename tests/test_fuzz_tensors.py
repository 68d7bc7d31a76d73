"""Tensors, adapters and models that are broken: loaded, or refused in one line, by whatever library reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

import tiny
from fuzz_mutations import mutated
from fuzz_targets import SECONDS, time_limit
from rankwise.adapters import load_adapter_folder
from rankwise.analysis.inspection import inspection
from rankwise.analysis.ranks import read_adapter
from rankwise.directions import load_checkpoint
from rankwise.directions.cache import StartCache
from rankwise.directions.model_files import ModelFiles, meta_model
from rankwise.errors import UserError
from rankwise.models import load_language_model, load_tokenizer
from rankwise.models.index import INDEX, read_index
from rankwise.preferences.reference_cache import ReferenceCache
from rankwise.schema import ModelSettings

FINGERPRINT = "0" * 32


def broken(folder: Path, name: str, read: Callable[[Path], object], runs: int) -> None:
    """Read a folder whose file of a name is broken in so many ways."""
    sound = (folder / name).read_bytes()
    read(folder)

    @settings(
        max_examples=runs, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.integers(0, 2**32))
    def one(seed: int) -> None:
        (folder / name).write_bytes(mutated(sound, Random(seed)))
        try:
            with time_limit(SECONDS):
                read(folder)
        except UserError as error:
            assert 0 < len(str(error)) < 4000 and "\n" not in str(error)

    one()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.make("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    tiny.adapted("llama").save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    named = json.loads(config.read_text()) | {"base_model_name_or_path": str(base), "task_type": "CAUSAL_LM"}
    config.write_text(json.dumps(named))
    return tmp_path / "adapter"


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_inspected_adapter(adapter: Path, name: str) -> None:
    broken(adapter, name, lambda folder: json.dumps(inspection(*read_adapter(folder))), 150)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_loaded_adapter(adapter: Path, name: str) -> None:
    broken(adapter, name, load_adapter_folder, 30)


@pytest.mark.parametrize("name", ["milora.json", "adapter_model.safetensors"])
def test_a_checkpoint(tmp_path: Path, name: str) -> None:
    tiny.milora(tiny.make("llama")).save_pretrained(tmp_path / "one")
    broken(tmp_path / "one", name, lambda folder: load_checkpoint(tiny.make("llama"), folder), 30)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_model_and_its_files(base: Path, tmp_path: Path, name: str) -> None:
    def read(folder: Path) -> None:
        model = meta_model(folder)
        files, names = ModelFiles(folder, model), list(dict(model.named_parameters()))[:3]
        files.check(names)
        for one in names:
            files.weight(one)
        load_language_model(ModelSettings(path=str(folder)))

    broken(Path(shutil.copytree(base, tmp_path / "model")), name, read, 40)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer(tiny_tokenizer: PreTrainedTokenizerFast, base: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(base, tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    broken(tmp_path / "model", name, lambda folder: load_tokenizer(str(folder))("A text."), 30)


def test_a_cached_start(tmp_path: Path) -> None:
    """Broken or not, the start is the right one."""
    weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    expected = StartCache(tmp_path).triplets(weight, 3, "minor")
    [file] = tmp_path.glob("*.safetensors")

    def read(folder: Path) -> None:
        for one, other in zip(StartCache(folder).triplets(weight, 3, "minor"), expected, strict=True):
            assert torch.equal(one, other)

    broken(tmp_path, file.name, read, 150)


def test_a_reference_cache(tmp_path: Path) -> None:
    """Broken or not, no value is wrong."""
    made = ReferenceCache(tmp_path, FINGERPRINT, "a model")
    made.add([1, 2], [[3], [4, 5]], [-1.5, -2.5])
    made.save()
    broken(
        tmp_path,
        made.path.name,
        lambda folder: np.testing.assert_equal(
            ReferenceCache(folder, FINGERPRINT).get([1, 2], [[3], [4, 5]]) or [-1.5, -2.5], [-1.5, -2.5]
        ),
        150,
    )


def test_an_adapter_of_no_tensors_is_refused(adapter: Path) -> None:
    save_file({}, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError):
        read_adapter(adapter)


@pytest.mark.parametrize(
    "changes", [{"rank_pattern": "q"}, {"r": [4]}, {"r": "4"}, {"rank_pattern": {".*": "../../x"}}]
)
def test_a_config_whose_ranks_are_none_is_refused(adapter: Path, changes: dict[str, object]) -> None:
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(UserError, match=r"adapter_config\.json gives .* no rank"):
        read_adapter(adapter)


def test_a_pickle_beside_a_checkpoint_is_not_read(tmp_path: Path) -> None:
    """PEFT reads adapter_model.bin where there are no safetensors."""
    tiny.milora(tiny.make("llama")).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model\.bin is a pickle, which can run code and is not read"):
        load_checkpoint(tiny.make("llama"), tmp_path)


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "..", "", "a/b", 1, "a" * 300])
def test_an_index_names_files_of_its_own_folder(base: Path, tmp_path: Path, name: object) -> None:
    shutil.copytree(base, tmp_path / "model")
    (tmp_path / "model" / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    for read in (lambda: read_index(tmp_path / "model"), lambda: load_model(tmp_path / "model")):
        with pytest.raises(UserError, match="is no file of this folder: fetch the file again"):
            read()


def load_model(folder: Path) -> object:
    return load_language_model(ModelSettings(path=str(folder)))


def test_a_model_that_brings_code_is_refused_at_once(base: Path, tmp_path: Path) -> None:
    """transformers would ask at the terminal whether to run it."""
    shutil.copytree(base, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}}
    config.write_text(json.dumps(json.loads(config.read_text()) | own))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("place", ["~nobody-of-this-name/model", "/" + "a" * 5000, "./a\0b"])
def test_a_place_that_cannot_be_is_no_model(place: str) -> None:
    with pytest.raises(UserError, match="no model's folder"):
        load_tokenizer(place)
