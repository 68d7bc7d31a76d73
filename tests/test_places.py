"""Where updates lie, against each measure's own function and by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import small_runs
import tiny
from rankwise.analysis.place_tables import place_section
from rankwise.analysis.places import places_by_kind, sampled, spectra_by_kind, update_place, update_places
from rankwise.analysis.runfolder import Run as RunFolder
from rankwise.analysis.spectra import effective_rank, update_overlap
from rankwise.analysis.updates import intruder_dimensions, projections
from rankwise.cli import main
from rankwise.errors import UserError
from rankwise.files import write_json
from rankwise.run import Run


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(12, 9), (9, 20)])
def test_each_measure_is_that_of_its_own_function(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = random(*shape).to(dtype)
    b, a = random(shape[0], 3, seed=1).to(dtype), random(3, shape[1], seed=2).to(dtype)
    found, delta = update_place(weight, (b, a), 3), b @ a
    overlap = update_overlap(weight, delta, 3)
    assert found["top"] == pytest.approx(overlap.top, rel=1e-3)
    assert found["bottom"] == pytest.approx(overlap.bottom, rel=1e-3)
    assert found["chance"] == overlap.chance
    assert found["amplification"] == pytest.approx(projections(weight, delta, 3).amplification, rel=1e-3)
    assert found["intruders"] == len(intruder_dimensions(weight, delta).places)
    assert found["effective_rank"] == pytest.approx(effective_rank(torch.linalg.svdvals(delta.double())[:3]), rel=1e-4)
    assert found["norm"] == pytest.approx(float(torch.linalg.norm(delta)), rel=1e-5)
    assert found["relative"] == pytest.approx(float(torch.linalg.norm(delta) / torch.linalg.norm(weight)), rel=1e-5)


@pytest.mark.parametrize(("part", "places"), [("top", (0, 1)), ("middle", (5, 6)), ("bottom", (10, 11))])
def test_an_update_in_one_part_lies_there_alone(part: str, places: tuple[int, int]) -> None:
    u, s, vh = torch.linalg.svd(random(12, 12))
    weight = u @ torch.diag(s) @ vh
    b, a = u[:, list(places)] * 0.1, vh[list(places)]
    found = update_place(weight, (b, a), 2)
    assert {name: round(found[name], 4) for name in ("top", "middle", "bottom")} == {
        name: float(name == part) for name in ("top", "middle", "bottom")
    }


def test_spectra_are_those_of_the_matrices() -> None:
    weight, b, a = random(12, 9), random(12, 3, seed=1), random(3, 9, seed=2)
    found = update_place(weight, (b, a), 3)["spectra"]
    for side, matrix in (("weight", weight), ("update", b @ a)):
        values = torch.linalg.svdvals(matrix)
        assert [value for _, value in found[side]] == pytest.approx(
            [float(values[at - 1]) for at, _ in found[side]], rel=1e-3
        )
    assert [place for place, _ in found["weight"]] == list(range(1, 10))
    assert [place for place, _ in found["update"]] == [1, 2, 3]
    places = [place for place, _ in sampled(torch.arange(5000.0, 0.0, -1.0))]
    assert (places[0], places[-1]) == (1, 5000)
    assert len(places) <= 33


def test_spectra_of_a_kind_are_means_over_its_layers() -> None:
    rows = [
        {"module": f"layers.{layer}.q", "spectra": {"weight": [[1, top], [2, 1.0]], "update": [[1, 0.5]]}}
        for layer, top in ((0, 2.0), (1, 4.0))
    ]
    assert spectra_by_kind(rows) == {"q": {"weight": [(1, 3.0), (2, 1.0)], "update": [(1, 0.5)]}}


def test_an_update_where_the_weight_has_nothing() -> None:
    weight = torch.zeros(6, 6)
    weight[0, 0] = 1.0
    b, a = torch.eye(6)[:, 3:4], torch.eye(6)[3:4]
    assert update_place(weight, (b, a), 1)["amplification"] > 1e6
    with pytest.raises(UserError, match="zero or not finite"):
        update_place(weight, (b * 0, a), 1)
    with pytest.raises(UserError, match="the weight is zero"):
        update_place(weight * 0, (b, a), 1)


def test_the_report_of_an_amplification_without_end(tmp_path: Path) -> None:
    """JSON has no infinity: it is read back as null."""
    weight, one = torch.zeros(6, 6), torch.eye(6)[3:4]
    weight[0, 0] = 1.0
    row = {"module": "layers.0.q", **update_place(weight, (one.T, one), 1), "amplification": math.inf}
    write_json(tmp_path / "updates.json", [row])
    assert json.loads((tmp_path / "updates.json").read_text())[0]["amplification"] is None
    assert place_section(RunFolder(tmp_path)).count(">-<") == 2  # of its kind, and of all modules


def test_modules_whose_weight_is_zero_are_passed_over() -> None:
    model = tiny.adapted("llama")
    tiny.train(model)
    name = update_places(model, 2)[0][0]["module"]
    model.get_base_model().get_submodule(name).get_base_layer().weight.data.zero_()
    rows, counts = update_places(model, 2)
    assert name not in {row["module"] for row in rows}
    assert counts == {"modules whose weight is zero": 1}


def test_a_models_modules_and_what_is_passed_over() -> None:
    model = tiny.adapted("llama")
    tiny.train(model)
    rows, counts = update_places(model, 2)
    assert len(rows) == 6
    assert counts == {}
    kinds = places_by_kind(rows)
    assert [kind["modules"] for kind in kinds] == [2, 2, 2, 6]
    whole = kinds[-1]
    assert whole["top"] == pytest.approx(sum(row["top"] for row in rows) / 6)
    assert math.log(whole["amplification"]) == pytest.approx(sum(math.log(row["amplification"]) for row in rows) / 6)
    with pytest.raises(UserError, match="no module of the model has an update"):
        update_places(tiny.milora(tiny.make("llama")), 2)


def test_the_command_and_the_report(tmp_path: Path, model_folder: Path, capsys: Any) -> None:
    recipe = small_runs.recipe("text", tmp_path, model_folder, evaluation={"updates": 4})
    Run(recipe, small_runs.silent())()
    rows = json.loads((tmp_path / "run" / "updates.json").read_text())
    assert {row["rank"] for row in rows} == {4}
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Where the updates lie" in page
    assert "Spectra of the weights and of the updates" in page
    assert main(["inspect", str(tmp_path / "run" / "adapter"), "--model", str(model_folder), "--directions", "4"]) == 0
    shown = capsys.readouterr().out
    assert "middle" in shown
    words = ["inspect", str(tmp_path / "run" / "adapter"), "--model", str(model_folder), "--directions", "4", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)["updates"]
    for one, other in zip(found, rows, strict=True):
        assert one["module"] == other["module"]
        assert one["top"] == pytest.approx(other["top"], rel=1e-2, abs=1e-4)
