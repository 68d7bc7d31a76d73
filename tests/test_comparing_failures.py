"""Comparisons in which something goes wrong: told early, in full, and without loss of what is there."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import rankwise.run
import small_runs
from rankwise.comparing import again, running
from rankwise.comparing.again import run_again
from rankwise.comparing.cell_run import run_cell
from rankwise.comparing.cells import Cell, digest_of
from rankwise.comparing.choosing import choose
from rankwise.comparing.compare import check, check_metrics, compare, final_cells
from rankwise.comparing.summary import restore
from rankwise.errors import UserError
from rankwise.recipes import make_comparison
from rankwise.schema import Comparison
from small_comparisons import fake, made

NO_END = "the template has no [/INST] in [q_proj]"


def values(folder: Path, model: Path, kind: str = "text", **changes: Any) -> dict[str, Any]:
    """LoRA and prompt tuning on one task, with one setting and one seed."""
    data, _, _ = small_runs.KINDS[kind]
    section = data(folder)
    return {
        "methods": [{"kind": "lora", "r": 2}, {"kind": "prompt", "tokens": 2}],
        "shared": {"model": {"path": str(model), "context": 64}},
        "tasks": {kind: {"data": section | {"validation": section["train"]}, "stages": [small_runs.SFT]}},
        "learning_rates": [1e-2],
        "seeds": [0],
        "output": str(folder / "out"),
    } | changes


def failed(recipe: Path, *_: Any) -> None:
    """A process whose run fails."""
    result = {"version": 1, "failed": NO_END}
    recipe.with_suffix(".json").write_text(json.dumps(result | {"digest": digest_of(result)}))


def cells_of(comparison: Comparison) -> list[Cell]:
    return final_cells(comparison, choose(comparison, fake(lambda _: 0.0, [])))


# Before any run


def test_a_metric_that_the_search_does_not_measure(tmp_path: Path, model_folder: Path) -> None:
    given = values(tmp_path, model_folder, "classification", metrics={"classification": "accuracy characters"})
    given["tasks"]["classification"]["evaluation"] = {"noise": ["characters"]}
    check_metrics(make_comparison(given))
    comparison = make_comparison(given | {"learning_rates": [1e-2, 1e-3]})
    message = r"in the search, .*: metrics\..* 'accuracy characters' is not measured there: known: F1, accuracy"
    with pytest.raises(UserError, match=message):
        compare(comparison, small_runs.silent())
    assert not Path(given["output"]).exists()


def test_texts_of_other_lengths(tmp_path: Path, model_folder: Path) -> None:
    """Two virtual tokens, and a model's own limit that they come off."""
    message = r"prompt would have shorter rows of text than other methods, by its 2 virtual tokens: give shared\.model"
    free = {"shared": {"model": {"path": str(model_folder)}}}
    for kind, evaluation in (("text", {}), ("instructions", {"texts": {"own": "text"}}), ("instructions", {})):
        (tmp_path / kind).mkdir(exist_ok=True)
        given = values(tmp_path / kind, model_folder, kind)
        texts = {name: given["tasks"][kind]["data"]["train"] for name in evaluation.get("texts", {})}
        given["tasks"][kind]["evaluation"] = {"texts": texts}
        check(make_comparison(given))
        check(make_comparison(given | free | {"methods": ["lora", "dora"]}))
        if kind == "text" or evaluation:
            with pytest.raises(UserError, match=message):
                check(make_comparison(given | free))
        else:
            check(make_comparison(given | free))


def test_cells_of_a_file_for_several_commands_at_a_time(tmp_path: Path) -> None:
    """All of them have all cells afterwards, whoever wrote them, and nothing else is left."""
    names, start = [f"cell{number}" for number in range(200)], threading.Barrier(4)
    column = {"run": names, "recipe": names, "result": names}

    def restored(folder: Path) -> int:
        start.wait(timeout=30)
        return restore(folder)

    for attempt in range(3):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        pl.DataFrame(column).write_parquet(folder / "runs.parquet")
        with ThreadPoolExecutor(4) as pool:
            assert {*pool.map(restored, [folder] * 4)} <= {0, 200}  # 0: they are there already
        assert {path.name for path in folder.iterdir()} == {"cells", "runs.parquet"}
        assert len(list((folder / "cells").iterdir())) == 400


# Runs that fail


def test_a_failure_is_told_to_the_letter_and_what_was_measured_before_it_is_kept(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base is measured beside the first method alone, which fails."""
    exact = rankwise.run.train_stage

    def training(*arguments: Any, adapter: Any, **more: Any) -> dict[str, int]:
        if adapter.kind == "lora":
            raise UserError(NO_END)
        return exact(*arguments, adapter=adapter, **more)

    monkeypatch.setattr(rankwise.run, "train_stage", training)
    monkeypatch.setattr(running, "in_a_process", lambda recipe, keep, *_: run_cell(recipe, keep))
    comparison, console = make_comparison(values(tmp_path, model_folder)), small_runs.silent()
    results = compare(comparison, console)
    assert f"  text, lora: {NO_END}\n" in small_runs.printed(console)
    lora, prompt = results["rows"]
    assert (lora["failed"], lora["mean"], lora["metrics"], lora["parameters"]) == (NO_END, None, {}, None)
    assert prompt["mean"] < results["base"]["text"]["loss"]
    [cell] = [one for one in cells_of(comparison) if one.method == "lora"]
    assert [row["name"] for row in (cell.result() or {})["rows"]] == ["base model"]


def test_failures_of_the_search_are_told(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "in_a_process", failed)
    console = small_runs.silent()
    compare(make_comparison(values(tmp_path, model_folder, learning_rates=[1e-2, 1e-3])), console)
    said = " ".join(small_runs.printed(console).split())
    assert "4 runs of the search failed, and lost; the first: text-lora-0.01-seed0-search0.25-" in said
    assert "do so where the cause has passed" in said


def test_a_run_that_fails_again_is_not_the_same(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in (again, running):
        monkeypatch.setattr(place, "in_a_process", failed)
    comparison, console = make_comparison(values(tmp_path, model_folder)), small_runs.silent()
    compare(comparison, small_runs.silent())
    found = run_again(comparison, "text-lora", console)
    assert (found["then"], found["now"], found["same"]) == ({}, {}, False)
    assert small_runs.printed(console).count(NO_END) == 2
    path = cells_of(comparison)[0].beside(".json")
    path.write_text(path.read_text().replace("[q_proj]", "[k_proj]"))
    with pytest.raises(UserError, match="is not as it was written"):
        run_again(comparison, "text-lora", console)
    shutil.copy(cells_of(comparison)[1].beside(".json"), path)
    monkeypatch.setattr(again, "in_a_process", lambda recipe, *_: recipe.with_suffix(".log").write_text("") - 9)
    with pytest.raises(UserError, match=r"without a result, by signal 9 \(Killed, .*\): it said nothing"):
        run_again(comparison, "text-lora", console)


@pytest.mark.parametrize(
    ("status", "logged", "message"),
    [
        (-9, b"loss \xff\nstep 3 of 9\n", r"by signal 9 \(Killed, perhaps for want of memory\): step 3 of 9 \(all"),
        (-11, b"", r"by signal 11 \(Segmentation fault\): it said nothing \(all"),
        (1, b"ImportError: x\xff\n", "with status 1: ImportError: x\ufffd \\(all"),
    ],
)
def test_how_a_process_ended_is_told_with_what_it_said(
    status: int, logged: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with what an earlier one said."""
    log = tmp_path / "cell.log"
    log.write_bytes(b"another error\n")

    def run(*_: Any) -> int:
        log.write_bytes(log.read_bytes() + logged)
        return status

    monkeypatch.setattr(running, "in_a_process", run)
    with pytest.raises(UserError, match=message):
        running._finish((str(tmp_path / "cell.yaml"), False, str(tmp_path)))


# Several at a time


def test_cells_are_told_in_the_order_in_which_they_finish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = cells_of(made(output=str(tmp_path), learning_rates=[0.1], seeds=[0]))
    second_told, seen = threading.Event(), []

    def finish(job: tuple[str, bool, str], **_: Any) -> None:
        if job[0].endswith(f"{cells[0].folder.name}.yaml"):
            second_told.wait(timeout=5)

    def told(cell: Cell) -> None:
        seen.append(cell.method)
        second_told.set()

    monkeypatch.setattr(running, "_finish", finish)
    running.run_cells(cells, 2, False, told)
    assert seen == ["small", "lora"]


def test_a_cell_that_fails_ends_those_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells, started = cells_of(made(output=str(tmp_path), learning_rates=[0.1])), []

    def finish(job: tuple[str, bool, str], children: running.Children, **_: Any) -> None:
        started.append(job)
        if job[0].endswith(f"{cells[1].folder.name}.yaml"):
            raise UserError("no")
        for _ in range(50):
            if children.ended:
                return
            threading.Event().wait(0.1)

    monkeypatch.setattr(running, "_finish", finish)
    with pytest.raises(UserError, match="no"):
        running.run_cells(cells, 2, False, lambda _: None)
    assert len(started) < len(cells)
