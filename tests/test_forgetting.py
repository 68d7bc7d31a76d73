"""Losses on texts that a run did not train for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import small_runs
from rankwise.errors import UserError
from rankwise.evaluation import evaluate_run
from rankwise.run import Run
from rankwise.tasks.forgetting import HeldOut


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "films.txt").write_text("The film was long. " * 40, encoding="utf-8")
    (tmp_path / "names.txt").write_text("A name, a name, and a model.\n" * 20, encoding="utf-8")
    return {name: str(tmp_path / f"{name}.txt") for name in ("films", "names")}


def test_the_loss_is_that_of_all_tokens_but_a_rows_first(
    texts: dict[str, str], tiny_llama: Any, tiny_tokenizer: Any
) -> None:
    held = HeldOut(texts, tiny_tokenizer, 32, None, 0)
    assert held.columns == ("films loss", "names loss")
    found = held.measure(tiny_llama)
    text = (Path(texts["films"])).read_text(encoding="utf-8").strip("\r\n")
    ids = [*tiny_tokenizer(text)["input_ids"], tiny_tokenizer.eos_token_id]
    rows = [ids[start : start + 32] for start in range(0, len(ids), 32)]
    if len(rows[-1]) == 1:
        rows[-1].insert(0, rows[-2].pop())
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = tiny_llama(torch.tensor([row])).logits[0, :-1].double()
        total -= float(logits.log_softmax(-1)[range(len(row) - 1), row[1:]].sum())
        count += len(row) - 1
    assert found["films loss"] == pytest.approx(total / count, rel=1e-5)
    assert all(map(math.isfinite, found.values()))


def test_rows_that_are_left_out_are_counted(texts: dict[str, str], tiny_llama: Any, tiny_tokenizer: Any) -> None:
    held = HeldOut(texts, tiny_tokenizer, 16, 3, 0)
    assert held.counts["films: rows left out"] > 0
    again = HeldOut(texts, tiny_tokenizer, 16, 3, 0)
    assert held.measure(tiny_llama) == again.measure(tiny_llama)


def test_a_run_measures_them_before_and_after(texts: dict[str, str], tmp_path: Path, model_folder: Path) -> None:
    recipe = small_runs.recipe("text", tmp_path, model_folder, evaluation={"texts": texts, "text_rows": 4})
    results = Run(recipe, small_runs.silent())()
    assert results["columns"] == ["loss", "perplexity", "films loss", "names loss"]
    base, trained = (row["metrics"] for row in results["rows"])
    assert set(base) == set(trained) == set(results["columns"])
    assert base["films loss"] != trained["films loss"]
    again = evaluate_run(tmp_path / "run", [], small_runs.silent())
    assert again["columns"] == results["columns"]
    assert again["rows"][-1]["metrics"]["names loss"] == pytest.approx(trained["names loss"], rel=1e-4)
    assert "films loss" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_mistakes(texts: dict[str, str], tmp_path: Path, model_folder: Path) -> None:
    missing = {"films": str(tmp_path / "no.txt")}
    recipe = small_runs.recipe("text", tmp_path, model_folder, evaluation={"texts": missing})
    with pytest.raises(UserError, match=r"evaluation.texts.films .*no.txt does not exist"):
        Run(recipe, small_runs.silent())
    with pytest.raises(UserError, match=r"evaluation.texts are for language models, not classification"):
        small_runs.recipe("classification", tmp_path, model_folder, evaluation={"texts": texts})


def other_tasks(tmp_path: Path) -> dict[str, Any]:
    sections = {"sums": small_runs.maths(tmp_path / "sums"), "quiz": small_runs.choices(tmp_path / "quiz")}
    return {name: dict(section) for name, section in sections.items()}


def test_tasks_that_are_not_trained_for_are_measured_too(tmp_path: Path, model_folder: Path) -> None:
    for name in ("sums", "quiz"):
        (tmp_path / name).mkdir()
    tasks = other_tasks(tmp_path)
    recipe = small_runs.recipe("text", tmp_path, model_folder, evaluation={"tasks": tasks})
    results = Run(recipe, small_runs.silent())()
    assert {"sums accuracy", "sums loss", "quiz accuracy"} <= set(results["columns"])
    base, trained = (row["metrics"] for row in results["rows"])
    assert set(base) == set(trained) == set(results["columns"])
    alone = small_runs.recipe("maths", tmp_path / "alone", model_folder, data=tasks["sums"])
    expected = Run(alone, small_runs.silent())()["rows"][0]["metrics"]
    assert {name.removeprefix("sums "): value for name, value in base.items() if name.startswith("sums ")} == {
        name: pytest.approx(value, rel=1e-5) for name, value in expected.items()
    }


@pytest.mark.parametrize(
    ("kind", "tasks", "message"),
    [
        ("classification", {"a": {"kind": "text", "train": "-"}}, "evaluation.tasks are for language models"),
        ("text", {"a": {"kind": "glue", "task": "rte"}}, "evaluation.tasks.a of kind glue is not possible"),
        ("text", {"films": {"kind": "text", "train": "-"}}, "a text and a task 'films'"),
        ("text", {"<b>": {"kind": "text", "train": "-"}}, "evaluation.tasks"),
        (
            "text",
            {"a": {"kind": "text", "train": "gone.txt"}},
            "evaluation.tasks.a: data.train gone.txt does not exist",
        ),
    ],
)
def test_tasks_that_are_not_possible(
    kind: str, tasks: dict[str, Any], message: str, texts: dict[str, str], tmp_path: Path, model_folder: Path
) -> None:
    asked = {"tasks": tasks} | ({"texts": texts} if "films" in tasks else {})
    with pytest.raises(UserError, match=message):
        Run(small_runs.recipe(kind, tmp_path, model_folder, evaluation=asked), small_runs.silent())
