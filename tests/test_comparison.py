"""Rows of a run compared case by case, in the report: the differences are those of the metrics' means."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

import small_runs
from rankwise.analysis.comparison import compared, comparison_section, read_cases, reference_row
from rankwise.analysis.report import render
from rankwise.analysis.runfolder import read_run
from rankwise.errors import UserError
from rankwise.files import write_json

GROUPS = ["1 head", "1 head", "3 tail", "3 tail"]


def cases(reciprocal: list[float]) -> pl.DataFrame:
    users = [f"u{number}" for number in range(4)]
    hits = [float(value == 1) for value in reciprocal]
    return pl.DataFrame({"user": users, "target": ["<b>a</b>"] * 4, "group": GROUPS, "HR@1": hits, "MRR": reciprocal})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two rows of results, each with its cases."""
    (tmp_path / "recipe.yaml").write_text("stages: [{name: sft, kind: sft}, {name: DPO, kind: dpo}]", encoding="utf-8")
    rows = [{"name": name, "metrics": {"HR@1": 0.5, "MRR": 0.5}, "cases": 4} for name in ("popularity", "sft", "DPO")]
    write_json(tmp_path / "results.json", {"task": "recommend", "columns": ["HR@1", "MRR"], "rows": rows})
    (tmp_path / "cases").mkdir()
    cases([1.0, 0.5, 0.25, 0.2]).write_parquet(tmp_path / "cases" / "sft.parquet")
    cases([1.0, 1.0, 0.5, 0.1]).write_parquet(tmp_path / "cases" / "DPO.parquet")
    return tmp_path


def test_differences_are_from_the_first_stage(folder: Path) -> None:
    run = read_run(folder)
    found = read_cases(run)
    assert list(found) == ["sft", "DPO"]  # popularity is not known case by case
    assert reference_row(run, list(found)) == "sft"
    differences = compared(found, "sft")
    assert list(differences) == ["DPO"]
    one = differences["DPO"]["MRR"]
    assert one.difference == pytest.approx((0.5 + 0.25 - 0.1) / 4)
    assert one.low <= one.difference <= one.high
    assert one.p == pytest.approx(4 / 8)  # of the 8 ways to exchange three differences: +++, ++-, and their mirrors


def test_the_section_has_both_tables(folder: Path) -> None:
    page = comparison_section(read_run(folder))
    assert "Mean difference from sft over the same 4 cases" in page
    assert "+0.163 [" in page
    assert "head (2 cases)" in page and "tail (2 cases)" in page and "middle (" not in page
    assert "0.750 [0.500, 1.000]" in page  # sft's MRR in the head
    assert "<b>" not in page


def test_users_are_grouped_where_it_is_known_what_they_chose(folder: Path) -> None:
    assert "how many titles the user chose" not in comparison_section(read_run(folder))
    for name, reciprocal in (("sft", [1.0, 0.5, 0.25, 0.2]), ("DPO", [1.0, 1.0, 0.5, 0.1])):
        known = cases(reciprocal).with_columns(activity=pl.Series(["1 up to 5", "3 more", "3 more", "1 up to 5"]))
        known.write_parquet(folder / "cases" / f"{name}.parquet")
    page = comparison_section(read_run(folder))
    assert "by how many titles the user chose" in page
    assert "up to 5 (2 cases)" in page and "more (2 cases)" in page
    assert "0.375 [0.250, 0.500]" in page  # sft's MRR of those who chose more


def test_without_cases_there_is_no_section(folder: Path) -> None:
    for path in (folder / "cases").iterdir():
        path.unlink()
    assert comparison_section(read_run(folder)) == ""
    assert "Case by case" not in render(read_run(folder))


def test_cases_that_do_not_belong_together_are_refused(folder: Path) -> None:
    cases([1.0, 1.0, 0.5, 0.1]).reverse().write_parquet(folder / "cases" / "DPO.parquet")
    with pytest.raises(UserError, match="DPO has other cases than sft: evaluate the run again"):
        read_cases(read_run(folder))
    cases([1.0, 1.0, 0.5, 0.1]).drop("group").write_parquet(folder / "cases" / "DPO.parquet")
    with pytest.raises(UserError, match=r"DPO\.parquet has no column 'group'"):
        read_cases(read_run(folder))
    (folder / "cases" / "DPO.parquet").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"DPO\.parquet is not readable as Parquet"):
        read_cases(read_run(folder))


def test_a_trained_run_has_it(tmp_path: Path, model_folder: Path) -> None:
    from rankwise.run import Run

    run = Run(small_runs.recipe("interactions", tmp_path, model_folder), small_runs.silent())
    run()
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert 'id="case-by-case"' in page
