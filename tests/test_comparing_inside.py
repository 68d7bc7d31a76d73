"""Learning curves, training scores and ranks by layer in a comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rankwise.comparing.inside import (
    POINTS,
    curves_figure,
    inside_figures,
    layer_ranks,
    loss_curve,
    mean_curve,
    memorised_figure,
    ranks_figure,
)

ROWS: list[dict[str, Any]] = [
    {
        "method": "lora",
        "mean": 0.7,
        "curve": [[10, 2.0], [20, 1.0]],
        "ranks": {"layer 0": 16.0, "layer 1": 16.0},
        "training": {"accuracy": 0.95},
    },
    {
        "method": "sora",
        "mean": 0.72,
        "curve": [[10, 2.5], [20, 1.5]],
        "ranks": {"layer 1": 3.4},
        "training": {"accuracy": 0.8},
    },
    {"method": "full", "mean": 0.6, "curve": [], "ranks": {}, "training": {}},
]


def written(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_a_curve_is_of_the_last_stage_and_has_few_points(tmp_path: Path) -> None:
    lines = [{"stage": "a", "step": 1, "loss": 9.0}]
    lines += [{"stage": "b", "step": step, "loss": float(step)} for step in range(1, 121)]
    lines += [{"stage": "b", "step": 120, "train_runtime": 3.0}]
    curve = loss_curve(written(tmp_path / "metrics.jsonl", lines))
    assert curve[:2] == [[3, 2.0], [6, 5.0]] and curve[-1] == [120, 119.0]
    assert len(curve) == 40 <= POINTS
    assert loss_curve(written(tmp_path / "metrics.jsonl", lines[:1])) == [[1, 9.0]]
    assert loss_curve(written(tmp_path / "metrics.jsonl", lines[-1:])) == []


def test_curves_are_averaged_where_all_have_a_step() -> None:
    assert mean_curve([[[1, 2.0], [2, 1.0]], [], [[1, 4.0], [3, 0.0]]]) == [[1, 3.0]]
    assert mean_curve([]) == mean_curve([[]]) == []


def test_ranks_are_added_up_by_layer(tmp_path: Path) -> None:
    names = ["layers.10.q", "layers.2.q", "layers.2.v", "head"]
    rows = [{"module": name, "rank": rank} for name, rank in zip(names, (1, 2, 3, 4), strict=True)]
    (tmp_path / "ranks.json").write_text(json.dumps(rows), encoding="utf-8")
    assert layer_ranks(tmp_path / "ranks.json") == {"layer 2": 5, "layer 10": 1, "outside layers": 4}
    assert list(layer_ranks(tmp_path / "ranks.json")) == ["layer 2", "layer 10", "outside layers"]
    assert layer_ranks(tmp_path / "none.json") == {}


def test_figures_show_the_methods_that_have_them() -> None:
    curves, memorised, ranks = curves_figure(ROWS), memorised_figure(ROWS, "accuracy"), ranks_figure(ROWS)
    assert curves is not None and memorised is not None and ranks is not None
    assert [(trace.name, trace.y) for trace in curves.data] == [("lora", (2.0, 1.0)), ("sora", (2.5, 1.5))]
    assert (memorised.data[0].x, memorised.data[0].y) == ((0.7, 0.72), (0.95, 0.8))
    assert list(ranks.data[0].y) == ["lora", "sora"]
    assert [list(row) for row in ranks.data[0].z] == [[16, 16], [None, 3]]
    found = {name: words for name, _, words in inside_figures(ROWS, "accuracy")}
    assert found == {
        "curves": "at the end lora has the least training loss (1), sora the most (1.5)",
        "memorised": "lora has the widest gap between training rows and held-out cases, 0.25",
        "ranks": "in all layers: lora 32, sora 3",
    }


@pytest.mark.parametrize("rows", [[], ROWS[2:]])
def test_nothing_is_drawn_of_nothing(rows: list[dict[str, Any]]) -> None:
    assert inside_figures(rows, "accuracy") == []
