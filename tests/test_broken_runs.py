"""Parts of a run, or of a checkpoint, that somebody broke: each is refused in one line."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import small_runs
import tiny
from rankwise import run
from rankwise.analysis.comparison import read_cases
from rankwise.analysis.runfolder import Run
from rankwise.comparing.cell_run import run_cell
from rankwise.errors import UserError
from rankwise.files import MANIFEST, Damaged, InUse, in_use
from rankwise.methods import load_stage, save_stage
from rankwise.preferences.reference_values import check_resumed
from rankwise.recipes import dump_recipe, make_recipe
from rankwise.recommend.logs.reading import Form, read_table, text
from rankwise.schema import Recipe
from rankwise.tasks import files
from rankwise.tasks.files import DataChanged

ADAPTER = "adapter_model.safetensors"


def test_a_stage_whose_adapter_lacks_a_tensor_does_not_fit(tmp_path: Path) -> None:
    model = tiny.adapted("llama")
    save_stage(model, tmp_path / "stage")
    (tmp_path / "stage" / MANIFEST).unlink()
    tensors = load_file(tmp_path / "stage" / ADAPTER)
    lacking = min(tensors)
    save_file({name: value for name, value in tensors.items() if name != lacking}, tmp_path / "stage" / ADAPTER)
    with pytest.raises(UserError, match=r"does not fit the model"):
        load_stage(model, tmp_path / "stage")


def test_the_cases_of_a_row_stay_within_the_run(tmp_path: Path) -> None:
    """A row's name is a file's: one that leads elsewhere, or that no file can have, has no cases."""
    (tmp_path / "run" / "cases").mkdir(parents=True)
    (tmp_path / "run" / "outside.parquet").write_bytes(b"not to be read")
    for name in ("../outside", str(tmp_path / "run" / "outside"), "{" * 5000, "half \ud800", "nothing \0"):
        assert read_cases(Run(tmp_path / "run", results={"rows": [{"name": name, "metrics": {}}]})) == {}


@pytest.mark.parametrize("content", ["{", "{}", '[["a"]]', "[1]"])
def test_what_a_checkpoint_tells_of_its_reference(tmp_path: Path, content: str) -> None:
    (tmp_path / "reference.json").write_text(content)
    with pytest.raises(UserError, match=r"reference\.json .*: resume from another checkpoint"):
        check_resumed(tmp_path, [], [], torch.float32)


def test_a_checkpoint_that_tells_of_no_reference(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="was trained without a reference, or by another trainer: begin anew"):
        check_resumed(tmp_path, [], [], torch.float32)


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", text.zstd.compress)])
def test_a_compressed_file_in_another_encoding_is_unpacked_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, pack: Callable[[bytes], bytes]
) -> None:
    path, form = tmp_path / f"log.csv{suffix}", Form(separator=",", encoding="utf-16")
    path.write_bytes(pack("user,item\n1,2\n".encode("utf-16")))
    assert read_table(path, form)[0].rows() == [("1", "2")]
    monkeypatch.setattr(text, "LARGEST", 20)
    with pytest.raises(UserError, match="it has more than 20 bytes, too many for a file that is not in UTF-8"):
        read_table(path, form)


@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz", "log.csv.zst", "log.jsonl"])
@pytest.mark.parametrize("order", ["utf-16-le", "utf-16-be"])
def test_a_log_in_utf_16_is_not_read_as_text_full_of_nul_characters(tmp_path: Path, name: str, order: str) -> None:
    content = "\ufeffuser,item\n1,2\n".encode(order)
    pack = {".gz": gzip.compress, ".zst": text.zstd.compress}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(pack(content))
    with pytest.raises(UserError, match="it is in UTF-16: save it in UTF-8"):
        read_table(tmp_path / name)


def test_a_cell_that_another_process_is_at_is_not_touched(model_folder: Path, tmp_path: Path) -> None:
    recipe: Any = small_runs.recipe("text", tmp_path, model_folder)
    file = tmp_path / "run.yaml"
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    with in_use(tmp_path / "run"):
        (tmp_path / "run" / "metrics.jsonl").write_text("{}")
        with pytest.raises(InUse):
            run_cell(file)
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
    assert not (tmp_path / "run.json").exists()


def broken_off(monkeypatch: pytest.MonkeyPatch, recipe: Recipe) -> None:
    """A run that ends before its first stage is trained."""

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("for the test")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="for the test"):
        patch.setattr(run, "train_stage", fails)
        run.Run(recipe, small_runs.silent())()


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("kind", ["instructions", "choices", "glue", "interactions"])
def test_a_run_whose_data_changed_is_not_gone_on_with(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, base: bool
) -> None:
    """A file, a folder of sets, a folder of GLUE's, a log with its items; with results so far, and without."""
    evaluation = {"base": base, "baselines": []}
    recipe = small_runs.recipe(kind, tmp_path, model_folder, stages=[small_runs.SFT], evaluation=evaluation)
    broken_off(monkeypatch, recipe)
    broken_off(monkeypatch, recipe)  # the same data are taken
    files = [path for path in tmp_path.rglob("*.*") if path.is_file() and tmp_path / "run" not in path.parents]
    file = max(files, key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes() + b"\n")
    with pytest.raises(UserError, match=r"data\.\S+( \(\S+\))? has changed since this run began.*begin another run"):
        run.Run(recipe, small_runs.silent())()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_run_whose_base_changed_is_not_gone_on_with(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    base = shutil.copytree(model_folder, tmp_path / "base")
    recipe = small_runs.recipe("text", tmp_path, base, stages=[small_runs.SFT])
    broken_off(monkeypatch, recipe)
    if name == "model.safetensors":
        tensors = load_file(base / name)
        save_file({key: value + 0.01 for key, value in tensors.items()}, base / name, metadata={"format": "pt"})
    else:
        (base / name).write_text((base / name).read_text() + "\n")
    with pytest.raises(DataChanged, match=rf"model\.path \({name}\) has changed since this run began"):
        run.Run(recipe, small_runs.silent())()


def test_a_run_whose_template_changed_is_not_gone_on_with(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = small_runs.values("interactions", tmp_path, model_folder, stages=[small_runs.SFT])
    own = tmp_path / "own.yaml"
    shipped = resources.files("rankwise.recommend") / "templates" / f"{values['data'].get('template', 'films')}.yaml"
    own.write_text(shipped.read_text())
    recipe = make_recipe(values | {"data": values["data"] | {"template": str(own)}})
    broken_off(monkeypatch, recipe)
    own.write_text(own.read_text() + "\n")
    with pytest.raises(DataChanged, match=r"data\.template has changed"):
        run.Run(recipe, small_runs.silent())()


def test_large_weights_are_compared_in_many_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK", 4)
    monkeypatch.setattr(files, "BLOCKS", 8)
    path, content = tmp_path / "model.safetensors", bytes(range(100))
    path.write_bytes(content)
    before = files._digest(path, tmp_path / "run")
    for changed in (content[:-1], content + b"x", b"x" + content[1:], content[:-1] + b"x", bytes(100)):
        path.write_bytes(changed)
        assert files._digest(path, tmp_path / "run") != before
    path.write_bytes(content)
    assert files._digest(path, tmp_path / "run") == before


def test_a_cell_with_a_damaged_stage_is_no_result_and_keeps_what_it_has(model_folder: Path, tmp_path: Path) -> None:
    stages = [small_runs.SFT, small_runs.SFT | {"name": "more"}]
    recipe = small_runs.recipe("instructions", tmp_path, model_folder, stages=stages)
    run.Run(recipe, small_runs.silent())()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    results["rows"] = [row for row in results["rows"] if row["name"] != "more"]
    (tmp_path / "run" / "results.json").write_text(json.dumps(results))
    (tmp_path / "run" / "report.html").unlink()
    (tmp_path / "run.yaml").write_text(dump_recipe(recipe))
    weights = tmp_path / "run" / "stages" / "sft" / ADAPTER
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(Damaged, match="is not as it was written"):
        run_cell(tmp_path / "run.yaml")
    assert not (tmp_path / "run.json").exists()
    weights.write_bytes(content)
    found = run_cell(tmp_path / "run.yaml")
    assert found["failed"] is None
    assert found["seconds"] is found["peak_memory"] is None  # nobody knows those of the process before


def test_a_cell_whose_data_changed_keeps_what_it_has(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no result: with the file given back the cell goes on."""
    recipe = small_runs.recipe("instructions", tmp_path, model_folder, stages=[small_runs.SFT])
    broken_off(monkeypatch, recipe)
    (tmp_path / "run.yaml").write_text(dump_recipe(recipe))
    (tmp_path / "run" / "checkpoints" / "sft").mkdir(parents=True)  # as if there were one to go on from
    file = Path(recipe.data.train)
    content = file.read_bytes()
    file.write_bytes(content + b"\n")
    with pytest.raises(DataChanged, match=r"data\.train has changed"):
        run_cell(tmp_path / "run.yaml")
    assert not (tmp_path / "run.json").exists() and (tmp_path / "run" / "checkpoints" / "sft").is_dir()
    file.write_bytes(content)
    assert run_cell(tmp_path / "run.yaml")["failed"] is None


def test_other_versions_than_a_run_began_with_are_told(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_runs.recipe("instructions", tmp_path, model_folder, stages=[small_runs.SFT])
    broken_off(monkeypatch, recipe)
    told = tmp_path / "run" / "versions.json"
    told.write_text(told.read_text().replace(f'"peft": "{version("peft")}"', '"peft": "0.20.9"'))
    console = small_runs.silent()
    results = run.Run(recipe, console)()
    assert f"peft was 0.20.9 when this run was last begun, and is {version('peft')} now" in small_runs.printed(console)
    assert results["counts"]["versions that changed while it was unfinished"] == 1
