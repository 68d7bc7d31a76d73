"""Drift of hidden states, against states computed row by row without padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

import small_runs
from rankwise.analysis.drift import VECTORS, drift
from rankwise.analysis.drift_figure import drift_figure, drift_words
from rankwise.analysis.representations import linear_cka
from rankwise.errors import UserError
from rankwise.methods import base_of, with_adapter
from rankwise.run import Run
from tiny_methods import KINDS, base, recipe, train

ROWS = [
    {"input_ids": [1, 5, 9, 2, 30, 7], "labels": [4, 8, 15, 16, 23, 42, 7]},
    {"input_ids": [3, 8, 40], "labels": [9, 9, 3]},
    {"input_ids": [11, 2, 6, 25, 1, 17, 13, 5, 21], "labels": [5, 1]},
]


@torch.no_grad()
def states(model: Any, kind: str) -> dict[str, Tensor]:
    """Of all tokens, from one row at a time."""
    found: dict[str, list[Tensor]] = {}
    for row in ROWS:
        labels = {"labels": torch.tensor([row["labels"]])} if kind == "encoder-decoder" else {}
        output = model(
            input_ids=torch.tensor([row["input_ids"]]),
            attention_mask=torch.ones(1, len(row["input_ids"]), dtype=torch.long),
            output_hidden_states=True,
            **labels,
        )
        layers = {str(number): one for number, one in enumerate(getattr(output, "hidden_states", None) or [])}
        for side, width in (("encoder", len(row["input_ids"])), ("decoder", len(row["labels"]))):
            for number, one in enumerate(getattr(output, f"{side}_hidden_states", None) or []):
                layers[f"{side} {number}"] = one[:, -width:]
        for name, one in layers.items():
            found.setdefault(name, []).append(one[0][-len(row["input_ids"]) :] if name.isdigit() else one[0])
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["lora", "milora", "pfeiffer", "prompt", "prefix", "full", "bitfit"])
def test_each_layer_is_compared_with_what_it_was(method: str, kind: str) -> None:
    wanted = recipe(method)
    torch.manual_seed(1)
    model = with_adapter(base(kind), wanted, KINDS[kind])
    train(model, kind, wanted)
    found = drift(model.train(), ROWS, 0)
    assert model.training
    model.eval()
    after = states(model, kind)
    with base_of(model):
        before = states(model, kind)
    assert found == {name: pytest.approx(linear_cka(before[name], after[name]), abs=1e-4) for name in before}
    assert min(value for value in found.values() if value is not None) < 0.999


def test_what_was_not_trained_has_not_drifted() -> None:
    model = with_adapter(base("decoder"), recipe("milora"), KINDS["decoder"])
    assert list(drift(model, ROWS, 0).values()) == pytest.approx([1.0] * 3)


def test_states_that_do_not_vary_are_not_compared() -> None:
    model = with_adapter(base("decoder"), recipe("lora"), KINDS["decoder"])
    assert drift(model, [{"input_ids": [5]}], 0) == {"0": None, "1": None, "2": None}


def test_of_many_tokens_some_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def noted(before: Tensor, after: Tensor) -> float:
        taken.append(len(before))
        return 1.0

    monkeypatch.setattr("rankwise.analysis.drift.linear_cka", noted)
    model = with_adapter(base("decoder"), recipe("lora"), KINDS["decoder"])
    for count in (127, 128, 150):  # rows of 32 tokens: one more than fit are thinned
        drift(model, [{"input_ids": [1, 2, 3, 4] * 8}] * count, 0)
    assert all(VECTORS / 2 < number <= VECTORS for number in taken)


def test_of_rows_of_one_length_no_place_is_taken_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankwise.analysis.drift.VECTORS", 40)
    monkeypatch.setattr("rankwise.analysis.drift.BATCH_TOKENS", 14)
    model = with_adapter(base("decoder"), recipe("lora"), KINDS["decoder"])
    rows = [{"input_ids": list(range(1 + at % 5, 8 + at % 5))} for at in range(20)]
    assert drift(model, rows, 0) == {name: pytest.approx(1.0) for name in "012"}


def test_an_encoder_decoder_that_classifies() -> None:
    config = base("encoder-decoder").config
    config.num_labels = 3
    model = with_adapter(AutoModelForSequenceClassification.from_config(config), recipe("lora"), "SEQ_CLS")
    end = config.eos_token_id
    found = drift(model, [{"input_ids": [5, 6, 7, end], "labels": 1}, {"input_ids": [8, 9, end], "labels": 0}], 1)
    assert list(found) == ["encoder 0", "encoder 1", "encoder 2"]


@pytest.mark.parametrize(
    "error", [RuntimeError("no memory"), UserError("nothing to see"), ZeroDivisionError("by zero")]
)
def test_a_look_that_fails_leaves_the_results(
    error: Exception, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise error

    monkeypatch.setattr("rankwise.run.drift", failing)
    console = small_runs.silent()
    results = Run(small_runs.recipe("text", tmp_path, model_folder, evaluation={"drift": 8}), console)()
    assert results["not_looked_at"] == {"drift": str(error)}
    assert f"evaluation.drift failed: {error}" in small_runs.printed(console)
    assert f"evaluation.drift failed: {error}" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "run" / "adapter").is_dir()


def test_the_figure_and_its_words() -> None:
    found = {"stories": {"0": 1.0, "1": 0.5, "2": None}, "none": {"0": None}}
    assert [list(trace.x) for trace in drift_figure(found).data] == [["0", "1"], []]
    assert drift_words(found) == "stories: least in layer 1, 0.5"


@pytest.mark.parametrize("kind", ["text", "classification"])
def test_a_run_that_looks(kind: str, tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "other.txt").write_text("Question: which is the red fox?\n" * 9, encoding="utf-8")
    texts = {"questions": str(tmp_path / "other.txt")} if kind == "text" else {}
    results = Run(
        small_runs.recipe(kind, tmp_path, model_folder, evaluation={"drift": 8, "texts": texts}), small_runs.silent()
    )()
    assert list(results["drift"]) == ["training rows", *texts]
    assert list(results["drift"]["training rows"]) == ["0", "1", "2"]
    assert results["drift"]["training rows"]["0"] == pytest.approx(1.0)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "How far hidden states have drifted" in page
