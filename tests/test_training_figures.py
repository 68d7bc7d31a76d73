"""Learning curves, training scores and ranks by layer in a comparison."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from rankwise.comparing.cell_run import layer_ranks, loss_curve
from rankwise.comparing.summary import _curve, _of_all
from rankwise.comparing.training_figures import training_figures

ROWS: list[dict[str, Any]] = [
    {
        "method": "sora",
        "mean": 0.72,
        "curve": [[10, 2.5], [20, 1.5]],
        "ranks": {"layers.10": 3.4},
        "training": {"accuracy": 0.8},
    },
    {
        "method": "lora",
        "mean": 0.7,
        "curve": [[20, 1.0]],
        "ranks": {"layers.2": 16.0, "layers.10": 16.0},
        "training": {"accuracy": 0.95},
    },
    {"method": "prompt", "mean": 0.9, "curve": [], "ranks": {}, "training": {"accuracy": 0.5}},
    {"method": "full", "mean": 0.6, "curve": [], "ranks": {}, "training": {}},
]


def written(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_a_curve_is_of_the_last_stage(tmp_path: Path) -> None:
    lines = [{"stage": "a", "step": 1, "loss": 9.0}, {"stage": "b", "step": 1, "loss": 3.0}]
    lines += [{"stage": "b", "step": 5, "loss": float("nan")}, {"stage": "b", "step": 10, "loss": 2.0}]
    lines += [{"stage": "b", "step": 10, "train_runtime": 3.0}]
    assert loss_curve(written(tmp_path / "metrics.jsonl", lines)) == [[1, 3.0], [10, 2.0]]
    assert loss_curve(written(tmp_path / "metrics.jsonl", lines[-1:])) == []


def test_curves_are_averaged_over_the_steps_of_the_shortest() -> None:
    assert _curve([[[1, 2.0], [3, 1.0]], [[1, 4.0], [2, 3.0], [4, 0.0]]]) == [[1, 3.0], [3, 1.25]]
    assert _curve([[[1, 2.0]]]) == [[1, 2.0]]
    assert _curve([]) == []


def test_what_some_runs_did_not_keep_is_not_averaged() -> None:
    runs = [{"failed": None, "ranks": {"a": 1}}, {"failed": None, "ranks": {}}, {"failed": "no", "ranks": {}}]
    assert _of_all(runs, "ranks") == []
    assert _of_all([runs[0], runs[2]], "ranks") == [{"a": 1}]


def test_ranks_are_added_up_by_layer(tmp_path: Path) -> None:
    names = ["layers.10.q", "layers.2.q", "layers.2.v", "head"]
    rows = [{"module": name, "rank": rank} for name, rank in zip(names, (1, 2, 3, 4), strict=True)]
    (tmp_path / "ranks.json").write_text(json.dumps(rows), encoding="utf-8")
    assert layer_ranks(tmp_path / "ranks.json") == {"layers.10": 1, "layers.2": 5, "": 4}
    assert layer_ranks(tmp_path / "none.json") == {}


def test_figures_show_the_methods_that_have_them() -> None:
    found = {name: (figure, words) for name, figure, words in training_figures(ROWS, "accuracy")}
    curves, memorised, ranks = (found[name][0] for name in ("curves", "memorised", "ranks"))
    assert [(trace.name, trace.y, trace.mode) for trace in curves.data] == [
        ("sora", (2.5, 1.5), "lines"),
        ("lora", (1.0,), "markers"),
    ]
    assert (memorised.data[0].x, memorised.data[0].y) == ((0.72, 0.7, 0.9), (0.8, 0.95, 0.5))
    assert (list(ranks.data[0].y), list(ranks.data[0].x)) == (["sora", "lora"], ["layer 2", "layer 10"])
    assert [list(row) for row in ranks.data[0].z] == [[None, 3], [16, 16]]
    assert found["curves"][1].endswith("at the end sora 1.5, lora 1")
    assert found["memorised"][1] == "lora is furthest ahead on training rows, by 0.25"
    assert "all layers: sora 3, lora 32" in found["ranks"][1]


def test_a_loss_that_is_lower_on_training_rows_is_ahead() -> None:
    rows = copy.deepcopy(ROWS)
    for row, loss in zip(rows, (0.5, 0.6, 2.0), strict=False):
        row["training"] = {"loss": loss}
    (words,) = [words for name, _, words in training_figures(rows, "loss") if name == "memorised"]
    assert words == "sora is furthest ahead on training rows, by 0.22"


def test_nothing_is_drawn_of_nothing() -> None:
    assert training_figures([], "accuracy") == training_figures(ROWS[3:], "accuracy") == []
