"""What a page tells of a run's gates over time, and of training and held-out scores against what they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rankwise.analysis import write_report
from rankwise.analysis.history import gates_path, parameters_path, rank_history, run_steps, threshold_path
from rankwise.analysis.retention import measured_twice, retained, retention_curve, stage_curve, stage_thresholds


def lines(stage: str, thresholds: list[float], gates: list[int], **more: Any) -> list[dict[str, Any]]:
    """Log lines of a stage at steps 10, 20 ..., whose gates have ten parameters each."""
    return [
        {"stage": stage, "step": 10 * at, "threshold": threshold, "gates_left": left, "gates": 8, "loss": 1.0}
        | {"parameters_left": 10 * left, **more}
        for at, (threshold, left) in enumerate(zip(thresholds, gates, strict=True), start=1)
    ]


TWO = lines("sft-1", [0.1, 0.1], [8, 6]) + lines("sft-2", [0.2, 0.2], [5, 4])


def row(name: str, training: float | None, held_out: float | None, parameters: int | None) -> dict[str, Any]:
    made: dict[str, Any] = {"name": name, "metrics": {"accuracy": held_out, "F1": 0.0}, "cases": 9}
    if training is not None:
        made |= {"training_metrics": {"accuracy": training, "F1": 0.0}, "training_cases": 1234}
    if parameters is not None:
        made["adapter"] = {"gates_left": parameters // 10, "gates": 8, "parameters_left": parameters}
    return made


ROWS = [
    row("most frequent", None, 0.5, None),
    row("base model", 0.4, 0.5, None),
    row("sft-1", 0.99, 0.75, 60),
    row("sft-2", 0.875, 0.8125, 40),
]
RESULTS = {"task": "classification", "columns": ["accuracy", "F1"], "rows": ROWS}


def test_steps_go_on_from_stage_to_stage() -> None:
    found, spans = run_steps(TWO)
    assert [line["step"] for line in found] == [10, 20, 30, 40]
    assert spans == [("sft-1", 0, 20), ("sft-2", 20, 40)]
    assert run_steps([{"stage": "a", "loss": 1.0}]) == ([], [("a", 0, 0)])


def test_gates_of_all_stages_in_one_figure() -> None:
    figure = gates_path(TWO)
    assert (figure.data[0].x, figure.data[0].y) == ((10, 20, 30, 40), (8, 6, 5, 4))
    assert [note.text for note in figure.layout.annotations] == ["sft-1", "sft-2"]
    assert [shape.x0 for shape in figure.layout.shapes] == [20]
    assert gates_path(TWO[:2]).layout.annotations == ()
    crowded = [line | {"stage": f"stage {at}"} for at in range(40) for line in TWO[:2]]
    shown = [note.text for note in gates_path(crowded).layout.annotations]
    assert len(gates_path(crowded).layout.shapes) == 39
    assert shown[:2] == ["stage 0", "stage 6"] and len(shown) <= 60 / len("stage 0")
    assert gates_path([{"stage": "a", "step": 1, "loss": 1.0}]) is None


def test_parameters_stand_beside_their_target() -> None:
    alone, with_target = parameters_path(TWO), parameters_path(lines("sft", [0.1], [8], parameters_target=56))
    assert [trace.name for trace in alone.data] == ["parameters left"]
    assert alone.data[0].y == (80, 60, 50, 40)
    assert [(trace.name, trace.y, trace.line.dash) for trace in with_target.data] == [
        ("parameters left", (80,), None),
        ("target", (56,), "dash"),
    ]
    assert parameters_path([{"stage": "a", "step": 1, "gates_left": 3}]) is None


def test_sizes_far_apart_are_on_a_log_scale() -> None:
    near, far = ({"rows": [row("a", 1.0, 0.5, 10), row("b", 1.0, 0.5, size)]} for size in (70, 90))
    assert retention_curve(RESULTS | near).layout.xaxis.type is None
    assert retention_curve(RESULTS | far).layout.xaxis.type == "log"
    none_left = {"rows": [row("a", 1.0, 0.5, 0), row("b", 1.0, 0.5, 90)]}
    assert retention_curve(RESULTS | none_left).layout.xaxis.type is None


def test_a_threshold_that_never_changes_is_no_figure() -> None:
    assert threshold_path(TWO).data[0].y == (0.1, 0.1, 0.2, 0.2)
    assert threshold_path(TWO[:2]) is None


def test_ranks_of_a_layer_are_added_up_over_its_modules() -> None:
    ranks = {"layers.0.q": 4, "layers.0.v": 2, "layers.10.q": 3, "layers.2.q": 1, "head": 5}
    later = ranks | {"layers.0.q": 1}
    figure = rank_history(
        [
            {"stage": "sft", "step": 1, "ranks": ranks},
            {"stage": "sft", "step": 5, "loss": 1.0},
            {"stage": "sft", "step": 9, "ranks": later},
        ]
    )
    (cells,) = figure.data
    assert list(cells.y) == ["layer 0", "layer 2", "layer 10", "outside layers"]
    assert [list(row) for row in cells.z] == [[6, 3], [1, 1], [3, 3], [5, 5]]
    assert list(figure.layout.xaxis.ticktext) == ["1", "9"]
    assert (cells.zmin, cells.zmax) == (0, 6)


def test_columns_of_several_stages_are_headed_by_their_names() -> None:
    """A layer that is gone from a later line has no direction left."""
    first = [{"stage": "a", "step": step, "ranks": {"layers.0.q": 2, "layers.1.q": 2}} for step in range(10)]
    figure = rank_history([*first, *({"stage": "b", "step": step, "ranks": {"layers.1.q": 1}} for step in range(5))])
    assert (list(figure.layout.xaxis.tickvals), list(figure.layout.xaxis.ticktext)) == ([0, 10], ["a", "b"])
    assert list(figure.data[0].x)[9:11] == ["a, step 9", "b, step 0"]
    assert list(figure.data[0].z[0]) == [2] * 10 + [0] * 5
    assert figure.data[0].texttemplate == ""


def test_lines_without_ranks_have_no_heat_map() -> None:
    assert rank_history([{"stage": "a", "step": 1, "ranks": {}}, {"stage": "a", "step": 2, "ranks": "no"}]) is None


# Memorisation and generalisation


def test_only_stages_with_both_scores_and_an_adapter_count() -> None:
    assert [one["stage"] for one in retained(RESULTS)] == ["sft-1", "sft-2"]
    broken = [row("a", 1.0, None, 60), row("b", None, 1.0, 60), row("c", float("nan"), 1.0, 60), row("d", 1.0, 1.0, 60)]
    assert [one["stage"] for one in retained(RESULTS | {"rows": broken})] == ["d"]
    assert retained({}) == []


def test_the_curve_is_the_first_metric_against_the_parameters() -> None:
    training, held_out = retention_curve(RESULTS).data
    assert (training.x, training.y, training.text) == ((40, 60), (0.875, 0.99), ("sft-2", "sft-1"))
    assert (held_out.x, held_out.y) == ((40, 60), (0.8125, 0.75))
    assert "memorisation" in training.name and "generalisation" in held_out.name
    assert retention_curve(RESULTS | {"rows": ROWS[:3]}) is None


def test_an_adapter_whose_directions_all_stay_has_the_curve_by_stage(tmp_path: Path) -> None:
    ungated = [{key: value for key, value in one.items() if key != "adapter"} for one in ROWS]
    results = RESULTS | {"rows": ungated}
    assert [one["stage"] for one in measured_twice(results)] == ["base model", "sft-1", "sft-2"]
    training, held_out = stage_curve(results).data
    assert (training.x, training.y) == (("base model", "sft-1", "sft-2"), (0.4, 0.99, 0.875))
    assert held_out.y == (0.5, 0.75, 0.8125)
    assert stage_curve(RESULTS | {"rows": ungated[:2]}) is None
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert page.count('data-figure="retention"') == 1 and "The model at each stage, in the order of training." in page
    assert "training (memorisation) 0.4 to 0.875" in page


STAGE = {"name": "sft-2", "threshold": 0.2}


def test_thresholds_are_the_recipes() -> None:
    stages = [{"name": "sft-1"}, STAGE, "none"]
    assert stage_thresholds({"adapter": {"threshold": 0.1}, "stages": stages}) == {"sft-1": 0.1, "sft-2": 0.2}
    budget = {"threshold": 0.1, "target_ratio": 0.7}
    assert stage_thresholds({"adapter": budget, "stages": [{"name": "sft"}]}) == {}
    assert stage_thresholds({"adapter": {"kind": "lora"}, "stages": [{"name": "sft"}]}) == {}
    assert stage_thresholds({}) == stage_thresholds({"adapter": "sora", "stages": {}}) == {}


@pytest.fixture
def page(tmp_path: Path) -> str:
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in TWO))
    recipe = {"adapter": {"kind": "sora", "threshold": 0.1}, "stages": [{"name": "sft-1"}, STAGE]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return write_report(tmp_path).read_text(encoding="utf-8")


def test_the_page_has_both_sections(page: str) -> None:
    assert page.index(">Memorisation and generalisation<") < page.index(">History of ranks<")
    assert "The accuracy on 1,234 training rows and on the held-out cases" in page
    assert "from 60 parameters (sft-1) to 40 (sft-2): training (memorisation) 0.99 to 0.875" in page
    body = page[page.index("Every stage, in the order of training.") :]
    cells = '<th scope="row">sft-2</th>' + "".join(
        f'<td class="number">{text}</td>' for text in ("0.2", "4 of 8", "40", "87.5 %", "81.2 %")
    )
    assert cells in body
    assert all(f'data-figure="history-{at}"' in page for at in range(3))


def test_a_run_without_training_scores_has_no_such_section(tmp_path: Path) -> None:
    plain = [{key: value for key, value in one.items() if key != "training_metrics"} for one in ROWS]
    (tmp_path / "results.json").write_text(json.dumps(RESULTS | {"rows": plain}))
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Memorisation" not in html and "History of ranks" not in html
