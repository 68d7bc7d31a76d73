"""Whole comparisons: cells that are run once, by one command or several."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import small_runs
from rankwise.cli import main
from rankwise.comparing import again as again_module
from rankwise.comparing import compare as comparing
from rankwise.comparing import running
from rankwise.comparing.again import run_again
from rankwise.comparing.cell_run import run_cell
from rankwise.comparing.cells import digest_of
from rankwise.comparing.compare import compare
from rankwise.errors import UserError
from rankwise.files import in_use
from rankwise.recipes import load_comparison, load_recipe, make_comparison
from rankwise.run import Run
from rankwise.versions import versions


@pytest.fixture
def values(tmp_path: Path, model_folder: Path) -> dict[str, Any]:
    """Two methods on text, with two rates and two seeds."""
    data = small_runs.text(tmp_path)
    texts = {"questions": str(tmp_path / "other.txt")}
    Path(texts["questions"]).write_text("Question: which is the red fox?\n" * 9, encoding="utf-8")
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("The red river had a model.\nThe blue dog had a film.\n", encoding="utf-8")
    return {
        "methods": [{"kind": "lora", "r": 2}, {"kind": "prompt", "tokens": 2}],
        "shared": {"model": {"path": str(model_folder), "context": 64}},
        "tasks": {
            "text": {
                "data": data | {"validation": str(held_out)},
                "stages": [small_runs.SFT],
                "evaluation": {"texts": texts, "updates": 2, "drift": 4, "training_cases": 5},
            }
        },
        "learning_rates": [1e-3, 1e-2],
        "seeds": [0, 1],
        "output": str(tmp_path / "out"),
    }


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Cells run without a process of their own; their names as they do."""
    ran: list[str] = []

    def run(recipe: Path, keep: bool, *_: Any) -> None:
        ran.append(recipe.stem)
        run_cell(recipe, keep)

    monkeypatch.setattr(running, "in_a_process", run)
    return ran


def test_a_comparison(values: dict[str, Any], in_this_process: list[str]) -> None:
    results = compare(make_comparison(values), small_runs.silent())
    assert len(in_this_process) == 2 * 2 + 2 * 2
    lora, prompt = results["rows"]
    assert (lora["metric"], set(lora["metrics"])) == ("loss", {"loss", "perplexity", "questions loss"})
    assert lora["parameters"] > prompt["parameters"] > 0
    assert lora["step_seconds"] > 0
    assert lora["peak_memory"] > 2**20
    runs = pl.read_parquet(Path(values["output"]) / "runs.parquet")
    assert sorted(runs["part"]) == ["final"] * 4 + ["search"] * 4
    assert "metric: questions loss" in runs.columns
    assert 0 < lora["updates"]["top"] < 1
    assert lora["updates"]["rank"] == 2
    assert prompt["updates"] == {}
    assert lora["ranks"] == {"model.layers.0": 14.0, "model.layers.1": 14.0} and prompt["ranks"] == {}
    assert prompt["curve"][0][0] == 1 and len(prompt["curve"]) == len(lora["curve"]) > 1
    assert prompt["training"].keys() == {"loss", "perplexity"}
    assert runs["training: loss"].is_not_null().to_list() == [part == "final" for part in runs["part"]]
    assert set(prompt["drift"]) == {"training rows", "questions"}
    assert 0 < prompt["drift"]["questions"]["2"] <= 1
    assert runs["drift: questions"].drop_nulls().len() == 4
    assert runs["updates: top"].drop_nulls().mean() == pytest.approx(lora["updates"]["top"])
    page = (Path(values["output"]) / "report.html").read_text(encoding="utf-8")
    assert "Where the updates lie" in page
    assert "Hidden states of questions, before and after training" in page

    # again: nothing is run, all is as it was
    assert compare(make_comparison(values), small_runs.silent()) == results
    assert len(in_this_process) == 8
    # one seed more, of two methods
    compare(make_comparison(values | {"seeds": [0, 1, 2]}), small_runs.silent())
    assert len(in_this_process) == 10
    # no models are kept
    folders = [path for path in (Path(values["output"]) / "cells").iterdir() if path.is_dir()]
    assert not any((folder / name).exists() for folder in folders for name in ("stages", "adapter"))


def test_runs_of_the_parquet_file_are_not_repeated(
    values: dict[str, Any], in_this_process: list[str], tmp_path: Path, capsys: Any
) -> None:
    results = compare(make_comparison(values | {"learning_rates": [1e-2]}), small_runs.silent())
    assert len(in_this_process) == 4
    folder, kept = Path(values["output"]), tmp_path / "kept.parquet"
    before = sorted(path.name for path in (folder / "cells").iterdir() if path.suffix in (".yaml", ".json"))
    (folder / "runs.parquet").rename(kept)
    shutil.rmtree(folder)
    folder.mkdir()
    shutil.copy(kept, folder / "runs.parquet")
    assert compare(make_comparison(values | {"learning_rates": [1e-2]}), small_runs.silent()) == results
    assert sorted(path.name for path in (folder / "cells").iterdir()) == before
    assert len(in_this_process) == 4
    # a cell that is removed runs again, though the file still has it
    (folder / "cells" / before[0]).unlink()
    compare(make_comparison(values | {"learning_rates": [1e-2]}), small_runs.silent())
    assert len(in_this_process) == 5


def test_what_is_finished_is_kept_where_a_comparison_is_broken_off(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(recipe: Path, keep: bool, *_: Any) -> None:
        if "seed1" in recipe.stem:
            raise KeyboardInterrupt
        run_cell(recipe, keep)

    monkeypatch.setattr(running, "in_a_process", run)
    with pytest.raises(KeyboardInterrupt):
        compare(make_comparison(values | {"learning_rates": [1e-2]}), small_runs.silent())
    assert pl.read_parquet(Path(values["output"]) / "runs.parquet")["seed"].to_list() == [0, 0]


def test_a_comparison_that_was_broken_off_before_its_first_run_goes_on(
    values: dict[str, Any], in_this_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    comparison = make_comparison(values | {"learning_rates": [1e-2], "seeds": [0]})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(running, "in_a_process", interrupted)
        compare(comparison, small_runs.silent())
    path = Path(values["output"]) / "runs.parquet"
    assert not path.exists()
    pl.DataFrame().write_parquet(path)  # as it was written by earlier versions
    assert compare(comparison, small_runs.silent())["runs"] == 2


def test_what_was_kept_stays_while_more_is_compared(
    values: dict[str, Any], in_this_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another learning rate, which is chosen among before any of the reported runs is looked at."""
    compare(make_comparison(values | {"learning_rates": [1e-2]}), small_runs.silent())
    path = Path(values["output"]) / "runs.parquet"
    before = pl.read_parquet(path)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(running, "in_a_process", interrupted)
        compare(make_comparison(values), small_runs.silent())
    kept = pl.read_parquet(path).select(before.columns)
    assert kept.sort("run").equals(before.sort("run"))
    compare(make_comparison(values), small_runs.silent())
    assert pl.read_parquet(path)["part"].value_counts().sort("part").rows() == [("final", 4), ("search", 4)]


def test_what_is_finished_is_kept_as_it_goes_on(
    values: dict[str, Any], in_this_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    monkeypatch.setattr(comparing, "EVERY", 0.0)
    monkeypatch.setattr(comparing, "write_runs", lambda _, rows, earlier: counts.append(len(rows)))
    compare(make_comparison(values | {"learning_rates": [1e-2]}), small_runs.silent())
    assert counts[-1] == 4
    assert counts[:-1] == sorted(counts[:-1])
    assert len(counts) == 5


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"a": [1]}, "holds no runs of a comparison|unable to find column"),
        ({"run": ["../a"], "recipe": [""], "result": [""]}, r"run '\.\./a' is no file name"),
    ],
)
def test_a_parquet_file_of_something_else(
    rows: dict[str, Any], message: str, values: dict[str, Any], tmp_path: Path
) -> None:
    Path(values["output"]).mkdir()
    pl.DataFrame(rows).write_parquet(Path(values["output"]) / "runs.parquet")
    with pytest.raises(UserError, match=message):
        compare(make_comparison(values), small_runs.silent())


def test_a_cell_runs_again_by_one_command_to_the_same_number(
    values: dict[str, Any], in_this_process: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = make_comparison(values | {"learning_rates": [1e-2], "keep": "adapters"})
    compare(comparison, small_runs.silent())
    cells = Path(values["output"]) / "cells"
    recipe = sorted(cells.glob("text-lora-*-seed1-*.yaml"))[0]
    kept = json.loads(recipe.with_suffix(".json").read_text())
    assert (recipe.with_suffix("") / "adapter" / "adapter_config.json").is_file()
    assert main(["train", str(recipe), f"output={tmp_path / 'again'}"]) == 0
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert again["rows"][-1]["metrics"] == kept["rows"][-1]["metrics"]

    # what it stood on then is told where it is another now
    assert kept["versions"] == versions()
    elsewhere = kept | {"versions": versions() | {"torch": "1.0", "processor": "an abacus"}}
    (step, _), *others = kept["curve"]
    elsewhere |= {"curve": [[step, 0.5], *others]}
    recipe.with_suffix(".json").write_text(json.dumps(elsewhere | {"digest": digest_of(elsewhere)}))
    monkeypatch.setattr(again_module, "in_a_process", lambda file, keep, *_: run_cell(file, keep))
    console = small_runs.silent()
    found = run_again(comparison, recipe.stem, console)
    assert found["same"]
    assert found["differing"]["processor"] == ("an abacus", versions()["processor"])
    assert found["losses_differ_from"] == step
    assert f"training losses differ from step {step} on" in small_runs.printed(console)
    assert f"torch was 1.0 then, and is {versions()['torch']} now" in small_runs.printed(console)
    assert compare(comparison, small_runs.silent())["mixed"]["torch"] == {versions()["torch"]: 3, "1.0": 1}
    assert "losses were not kept" not in small_runs.printed(console)
    lossless = kept | {"curve": []}
    recipe.with_suffix(".json").write_text(json.dumps(lossless | {"digest": digest_of(lossless)}))
    assert run_again(comparison, recipe.stem, console)["losses_differ_from"] is None
    assert "training losses were not kept then" in small_runs.printed(console)


def test_processes_of_their_own_give_the_same(values: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    values = values | {"learning_rates": [1e-2], "seeds": [0], "processes": 2}
    comparison = make_comparison(values)
    results = compare(comparison, small_runs.silent())
    [one] = [row for row in results["rows"] if row["method"] == "lora"]
    recipe = load_recipe(
        next((Path(values["output"]) / "cells").glob("text-lora-*.yaml")), [f"output={tmp_path / 'b'}"]
    )
    assert Run(recipe, small_runs.silent())()["rows"][-1]["metrics"] == pytest.approx(one["metrics"], rel=1e-5)

    # one command, from the file of runs alone, to the same number
    shutil.rmtree(Path(values["output"]) / "cells")
    file = tmp_path / "comparison.yaml"
    file.write_text(json.dumps(values), encoding="utf-8")
    capsys.readouterr()
    assert main(["compare", str(file), "--again", "text-lora", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["same"]
    assert again["now"] == one["metrics"]
    assert again["differing"] == {}
    assert again["losses_differ_from"] is None
    assert not list((Path(values["output"]) / "cells").glob("*lora*/"))
    for name, message in (
        ("text-lara", "has no finished run 'text-lara'"),
        ("text-", "2 runs of .* begin with 'text-'"),
    ):
        with pytest.raises(UserError, match=message):
            run_again(comparison, name, small_runs.silent())


def test_a_metric_that_no_task_has_is_told_before_anything_is_run(
    values: dict[str, Any], in_this_process: list[str]
) -> None:
    with pytest.raises(UserError, match=r"metrics\.text 'Loss' is not measured there: did you mean 'loss'\?"):
        compare(make_comparison(values | {"metrics": {"text": "Loss"}}), small_runs.silent())
    assert in_this_process == []


def test_a_method_that_a_model_cannot_carry_is_told(values: dict[str, Any], in_this_process: list[str]) -> None:
    values = values | {"methods": ["lora", "bitfit"], "learning_rates": [1e-2], "seeds": [0]}
    console = small_runs.silent()
    bitfit = compare(make_comparison(values), console)["rows"][1]
    assert bitfit["mean"] is None
    assert "bitfit trains biases" in bitfit["failed"]
    said = small_runs.printed(console)
    assert (
        "text, bitfit: adapter.kind bitfit trains biases" in said and "what failed is not tried again, unless" in said
    )


def test_a_process_that_dies_is_told_with_its_log(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "in_a_process", lambda recipe, *_: running._log(recipe).write_text("Killed\n"))
    with pytest.raises(UserError, match=r"ended without a result, .*: Killed \(all of it: .*\.log\)"):
        compare(make_comparison(values), small_runs.silent())


def test_results_of_another_version(values: dict[str, Any], in_this_process: list[str]) -> None:
    comparison = make_comparison(values | {"learning_rates": [1e-2], "seeds": [0]})
    compare(comparison, small_runs.silent())
    path = next((Path(values["output"]) / "cells").glob("*lora*.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))
    with pytest.raises(UserError, match="is of version 99, and this is 1"):
        compare(comparison, small_runs.silent())
    path.write_text("{")
    with pytest.raises(UserError, match=r"is not JSON .*: remove it to run the cell again"):
        compare(comparison, small_runs.silent())


def test_an_output_that_is_something_else(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds something other than a comparison"):
        compare(make_comparison(values | {"output": str(tmp_path)}), small_runs.silent())


def test_the_command(values: dict[str, Any], in_this_process: list[str], tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps(values), encoding="utf-8")
    assert load_comparison(file).methods[1].name == "prompt"
    assert main(["compare", str(file), "seeds=[0]", "learning_rates=[0.01]", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["runs"] == 2
    assert main(["compare", str(file), "against=dora"]) == 2
    assert "against 'dora' is none of the methods" in capsys.readouterr().err


# Two commands at a time


def test_a_cell_that_another_command_runs_is_waited_for(tmp_path: Path) -> None:
    recipe = tmp_path / "cell.yaml"
    with in_use(tmp_path / "cell"):
        waiting = threading.Thread(target=running._finish, args=((str(recipe), False, str(tmp_path)),))
        waiting.start()
        time.sleep(0.2)
        assert waiting.is_alive()
        (tmp_path / "cell.json").write_text("{}")
        waiting.join(timeout=10)
    assert not waiting.is_alive()
    assert not (tmp_path / "cell.log").exists()


def test_a_cell_whose_process_finds_another_at_it_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    statuses = [running.BUSY, running.BUSY, 0]

    def run(*_: Any) -> int:
        status = statuses.pop(0)
        if not status:
            (tmp_path / "cell.json").write_text("{}")
        return status

    monkeypatch.setattr(running, "in_a_process", run)
    running._finish((str(tmp_path / "cell.yaml"), False, str(tmp_path)))
    assert statuses == []


def test_a_command_that_is_asked_to_end_ends_its_cells(tmp_path: Path) -> None:
    """Those that run, and one that begins afterwards."""
    children, sleep = running.Children(), [sys.executable, "-c", "import time; time.sleep(60)"]
    begun = time.monotonic()
    for when in ("before", "after"):
        with subprocess.Popen(sleep) as process, children.known(process):
            if when == "before":
                children.end()
            assert process.wait(timeout=30) == -signal.SIGTERM
    with subprocess.Popen(sleep) as process, contextlib.suppress(RuntimeError), running.Children().known(process):
        raise RuntimeError
    assert process.returncode == -signal.SIGTERM
    assert time.monotonic() - begun < 30


def test_a_cell_whose_result_was_removed_is_run_again(values: dict[str, Any], in_this_process: list[str]) -> None:
    comparison = make_comparison(values | {"learning_rates": [1e-2], "seeds": [0]})
    before = compare(comparison, small_runs.silent())["rows"]
    for path in (Path(values["output"]) / "cells").glob("*.json"):
        path.unlink()
    after = compare(comparison, small_runs.silent())["rows"]
    assert [(row["mean"], row["failed"]) for row in after] == [(row["mean"], row["failed"]) for row in before]
    assert len(in_this_process) == 4


def test_a_cell_that_is_finished_is_left_as_it_is(values: dict[str, Any], in_this_process: list[str]) -> None:
    compare(make_comparison(values | {"learning_rates": [1e-2], "seeds": [0]}), small_runs.silent())
    path = next((Path(values["output"]) / "cells").glob("*lora*.json"))
    content = path.read_bytes()
    run_cell(path.with_suffix(".yaml"))
    assert path.read_bytes() == content


def test_a_result_that_is_not_as_it_was_written(values: dict[str, Any], in_this_process: list[str]) -> None:
    comparison = make_comparison(values | {"learning_rates": [1e-2], "seeds": [0]})
    compare(comparison, small_runs.silent())
    path = next((Path(values["output"]) / "cells").glob("*lora*.json"))
    path.write_text(path.read_text().replace('"threads": ', '"threads": 1'))
    with pytest.raises(UserError, match="is not as it was written: remove it to run the cell again"):
        compare(comparison, small_runs.silent())
