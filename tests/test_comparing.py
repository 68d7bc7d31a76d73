"""Comparisons: plans, choices by halving, and what the tables say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import small_runs
from rankwise.comparing.cells import Cell, Setting, make_cell, settings
from rankwise.comparing.choosing import choose
from rankwise.comparing.compare import _by_task, compare, final_cells
from rankwise.comparing.formats import latex, markdown
from rankwise.comparing.statistics import holm, paired, spread
from rankwise.comparing.summary import run_rows, summarise
from rankwise.comparing.tables import ranked
from rankwise.errors import UserError
from rankwise.schema import Comparison
from small_comparisons import TASK, fake, made, results_of, summary_of


def cell(comparison: Comparison, number: int = 0, part: str = "search", **setting: Any) -> Cell:
    task = next(iter(comparison.tasks))
    return make_cell(comparison, task, comparison.methods[number], Setting(1e-3, **setting), 0, 0.5, part)


# Plans


def test_settings_are_rates_by_ranks_where_a_method_has_them() -> None:
    comparison = made(
        methods=["lora", "houlsby", {"kind": "dora", "learning_rates": [0.5], "ranks": [1]}], ranks=[2, 4]
    )
    lora, houlsby, dora = (settings(comparison, entry) for entry in comparison.methods)
    assert lora == [Setting(rate, rank) for rate in (1e-3, 1e-2, 1e-1, 1.0) for rank in (2, 4)]
    assert houlsby == [Setting(rate) for rate in (1e-3, 1e-2, 1e-1, 1.0)]
    assert dora == [Setting(0.5, 1)]
    sora = made(methods=["sora", {"kind": "milora_sora", "budgets": [0.5]}, "lora"], budgets=[0.3, 0.7])
    tried = [[(one.rank, one.budget) for one in settings(sora, entry)[:3]] for entry in sora.methods]
    assert tried == [[(None, 0.3), (None, 0.7), (None, 0.3)], [(None, 0.5)] * 3, [(None, None)] * 3]
    own_rank = made(ranks=[2, 4]).methods[1]
    assert {setting.rank for setting in settings(comparison, own_rank)} == {None}


def test_a_cell_is_the_tasks_recipe_with_what_is_compared() -> None:
    found = cell(made(), rank=7).recipe
    assert (found.adapter.kind, found.adapter.r) == ("lora", 7)
    assert (found.stages[-1].learning_rate, found.stages[-1].epochs) == (1e-3, 1.0)
    assert not found.evaluation.base
    assert cell(made(), 1).recipe.adapter.r == 4


def test_a_budget_that_is_tried_is_a_share_of_the_parameters() -> None:
    comparison = made(methods=["sora"])
    found = make_cell(comparison, "stories", comparison.methods[0], Setting(0.01, 8, 0.25), 0, 1.0, "final")
    assert (found.recipe.adapter.r, found.recipe.adapter.target_ratio) == (8, 0.25)
    assert found.folder.name.startswith("stories-sora-0.01-r8-budget0.25-seed0-")


def test_a_search_does_not_see_what_is_reported() -> None:
    assert cell(made()).recipe.data.validation is None
    assert cell(made(), part="final").recipe.data.validation == "b.txt"
    glue = {"data": {"kind": "glue", "task": "rte"}, "stages": [{"kind": "sft"}]}
    assert cell(made(tasks={"rte": glue})).recipe.data.measure == "holdout"
    films = {"data": {"kind": "interactions", "interactions": "r.csv"}, "stages": [{"kind": "sft"}]}
    assert cell(made(tasks={"films": films})).recipe.evaluation.split == "validation"
    assert cell(made(tasks={"films": films}), part="final").recipe.evaluation.split == "test"


def test_updates_are_looked_at_where_a_method_has_them() -> None:
    comparison = made(methods=["sora", "full", "vera", "bitfit"], tasks={"a": TASK | {"evaluation": {"updates": 4}}})
    found = [cell(comparison, number, part="final").recipe.evaluation.updates for number in range(4)]
    assert found == [4, 4, 4, None]


def test_the_base_is_measured_beside_the_first_method_alone() -> None:
    assert [cell(made(), number, "final").recipe.evaluation.base for number in (0, 1)] == [True, False]


def test_a_cells_place_follows_from_all_that_it_depends_on() -> None:
    first = cell(made()).folder
    assert cell(made(output="elsewhere")).folder.name == first.name
    assert cell(made(shared={"model": {"context": 64}})).folder.name != first.name
    stages = [TASK["stages"][0] | {"batch_size": 16}]  # as by default: what is not said does not count
    assert cell(made(tasks={"stories": TASK | {"stages": stages}})).folder.name == first.name
    kinds = [{"kind": kind, "name": "mine"} for kind in ("lora", "sora", "adalora", "milora", "full", "prompt", "vera")]
    assert len({cell(made(methods=[kind])).folder.name for kind in kinds}) == len(kinds)
    assert first.name.startswith("stories-lora-0.001-seed0-search0.5-")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["lora", "lora"]}, "methods 'lora' occurs twice"),
        ({"methods": ["lora", {"kind": "lora", "name": "LoRA"}]}, "methods 'LoRA' occurs twice, letters' case aside"),
        ({"methods": ["lra"]}, "'lra' is no method: did you mean 'lora'"),
        ({"methods": [{"kind": "pissa", "part": "minor"}]}, "adapter.part 'minor' is not PiSSA"),
        ({"methods": [{"kind": "lora", "name": "a/b"}]}, r"methods.0.name 'a/b'"),
        ({"methods": []}, "methods"),
        ({"against": "mlora"}, "against 'mlora' is none of the methods"),
        ({"metrics": {"stries": "loss"}}, "metrics.stries is of no task: did you mean 'stories'"),
        ({"tasks": {"a/b": TASK}}, "tasks 'a/b' becomes a part of file names"),
        ({"tasks": {"a\n": TASK}}, r"tasks 'a\\n' becomes a part of file names"),
        ({"tasks": {"con.x": TASK}}, "Windows takes no file of the name 'con.x': choose another"),
        ({"methods": [{"kind": "lora", "name": "a."}]}, "Windows takes no file of the name 'a.': choose another"),
        ({"tasks": {81 * "a": TASK}}, "take up to 80 letters"),
        ({"methods": [{"kind": "lora", "name": 81 * "a"}]}, "String should match pattern"),
        ({"methods": [{"kind": "lora", "r": 4, "ranks": [2]}]}, r"methods.lora has r 4 and ranks \[2\]"),
        (
            {"methods": [{"kind": "lora", "budgets": [0.5]}]},
            "methods.lora.budgets is for SoRA, not lora",
        ),
        ({"methods": [{"kind": "sora", "budgets": [2]}]}, r"budgets.0 2: Input should be less than 1"),
        (
            {"methods": [{"kind": "sora", "target_ratio": 0.7, "budgets": [0.5]}]},
            r"methods.sora has target_ratio and budgets \[0.5\]: leave one out",
        ),
        ({"budgets": [0.5, 0.5]}, r"budgets \[0.5, 0.5\] has one of them twice"),
        ({"seeds": [0, 0]}, r"seeds \[0, 0\] has one of them twice"),
        ({"search": {"seeds": [1, 1]}}, r"search.seeds \[1, 1\] has one of them twice"),
        ({"search": {"seeds_of": {"stories": [2, 2]}}}, r"search.seeds_of.stories \[2, 2\] has one of them twice"),
        ({"search": {"seeds_of": {"storys": [2]}}}, "search.seeds_of.storys is of no task: did you mean 'stories'"),
        ({"search": {"seeds_of": {"stories": []}}}, "search.seeds_of.stories .*at least 1 item"),
        ({"methods": [{"kind": "lora", "ranks": [2, 2]}]}, r"methods.lora.ranks \[2, 2\] has one of them twice"),
        (
            {"methods": [{"kind": "lora", "learning_rates": [1, 1]}]},
            "methods.lora.learning_rates .* has one of them tw",
        ),
        ({"methods": [{"kind": "sora", "budgets": [0.5, 0.5]}]}, "methods.sora.budgets .* has one of them twice"),
        ({"learning_rates": [-1]}, "learning_rates.0"),
        ({"lerning_rates": [1]}, "lerning_rates is unknown: did you mean 'learning_rates'"),
    ],
)
def test_mistakes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(**changes)


LOG = {"kind": "interactions", "interactions": "log.csv", "items": "items.csv"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tasks": {"a": TASK | {"data": TASK["data"] | {"validation": None}}}},
            "data.validation is missing: settings",
        ),
        ({"tasks": {"a": TASK | {"adapter": "lora"}}}, "tasks.a.adapter 'lora': the comparison sets it"),
        ({"tasks": {"a": {"data": TASK["data"]}}}, "tasks.a with lora: stages are missing"),
        ({"tasks": {"a": TASK | {"evaluation": "fast"}}}, "tasks.a.evaluation 'fast' is no mapping"),
        ({"tasks": {"a": TASK | {"stages": [{"kind": "sft", "epochs": "lots"}]}}}, "epochs 'lots' of the last stage"),
        ({"tasks": {"a": {"stages": TASK["stages"]}}}, "tasks.a with lora: data are missing"),
        (
            {"tasks": {"a": TASK | {"data": LOG | {"split": "users"}}}},
            "tasks.a with lora: data.split users deals them out anew for each seed: take last or time",
        ),
        (
            {"tasks": {"a": TASK | {"data": LOG, "evaluation": {"split": "validation"}}}},
            "tasks.a with lora: evaluation.split validation is what settings are chosen by: leave it out",
        ),
        ({"methods": [{"kind": "lora", "x": 1}]}, "tasks.stories with lora: adapter.x is unknown"),
        ({}, "data.train a.txt does not exist"),
    ],
)
def test_mistakes_that_are_told_before_any_run(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        compare(made(output=str(tmp_path / "out"), **changes), small_runs.silent())
    assert not (tmp_path / "out").exists()


# Statistics against scipy


def test_spread_is_that_of_scipy() -> None:
    values = [0.61, 0.58, 0.66, 0.6]
    found = spread(values)
    interval = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert found == pytest.approx((np.mean(values), np.std(values, ddof=1), *interval))
    assert spread([2.0])[0] == 2.0
    assert all(map(math.isnan, spread([2.0])[1:]))


def test_paired_difference_is_that_of_scipy() -> None:
    one, other = {0: 0.6, 1: 0.7, 2: 0.65, 5: 1.0}, {0: 0.5, 1: 0.72, 2: 0.6, 7: 0.0}
    found = paired(one, other)
    assert found is not None
    assert found.p == pytest.approx(stats.ttest_rel([0.6, 0.7, 0.65], [0.5, 0.72, 0.6]).pvalue)
    assert found.mean == pytest.approx(0.13 / 3)
    assert paired({0: 1.0}, {1: 1.0}) is None
    assert math.isnan(paired({0: 1.0}, {0: 0.5}).p)  # type: ignore[union-attr]
    assert paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).p == 1  # type: ignore[union-attr]
    assert math.isnan(paired({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0}).p)  # type: ignore[union-attr]
    assert math.isnan(paired({0: 0.3, 1: 0.4}, {0: 0.2, 1: 0.3}).p)  # type: ignore[union-attr]


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, math.nan, 0.8])[::2] == [1.0, 1.0]
    assert math.isnan(holm([math.nan])[0])


# Tables


def test_tables(tmp_path: Path) -> None:
    comparison = made(output=str(tmp_path), learning_rates=[0.1], methods=["lora", "dora", "vera"])
    values = {
        ("lora", 0): 1.0,
        ("lora", 1): 1.2,
        ("lora", 2): 1.1,
        ("dora", 0): 0.8,
        ("dora", 1): 1.1,
        ("dora", 2): 0.9,
    }
    cells = final_cells(comparison, choose(comparison, fake(lambda _: 0.0, [])))
    fake(lambda one: values.get((one.method, one.seed)), [])(cells)
    rows = run_rows(comparison, cells)
    summary = summarise(comparison, rows, choose(comparison, fake(lambda _: 0.0, [])))
    lora, dora, vera = summary
    assert (lora["mean"], lora["difference"]) == (pytest.approx(1.1), None)
    assert dora["difference"] == pytest.approx(-1 / 6)
    assert dora["p_holm"] == dora["p"] == pytest.approx(stats.ttest_rel([0.8, 1.1, 0.9], [1.0, 1.2, 1.1]).pvalue)
    assert (vera["mean"], vera["failed"]) == (None, "no")
    text = markdown(results_of(comparison, summary))
    assert [line.split(" | ")[0] for line in text.splitlines()[4:]] == ["| dora", "| lora", "| vera"]  # less is better
    assert "| 0.9333 ± 0.1528 | 0.5539 to 1.3128 | -0.1667 |" in text
    assert "not possible" in text
    assert r"dora & 0.9333 $\pm$ 0.1528 & 0.5539 to 1.3128 & -0.1667" in latex(results_of(comparison, summary))


def test_a_method_that_lacks_seeds_stands_behind_those_that_do_not(tmp_path: Path) -> None:
    """full is better on the mean of its two seeds, and worse on each of them."""
    values = {"lora": {0: 3.0, 1: 1.4, 2: 1.2}, "full": {1: 1.5, 2: 1.3}}
    comparison = made(output=str(tmp_path), learning_rates=[0.1], methods=["lora", "full", "vera"])
    summary = summary_of(comparison, lambda one: values.get(one.method, {}).get(one.seed))
    assert [row["method"] for row in ranked(summary, 3)] == ["lora", "full"]
    text = markdown(results_of(comparison, summary))
    assert "over 3 seeds (of fewer where the row says so: these rows come last)" in text
    assert [line.split(" | ")[:2] for line in text.splitlines()[4:]] == [
        ["| lora", "1.8667 ± 0.9866"],
        ["| full", "1.4000 ± 0.1414, 2 of 3 seeds"],
        ["| vera", "not possible"],
    ]
    assert r"full & 1.4000 $\pm$ 0.1414, 2 of 3 seeds &" in latex(results_of(comparison, summary))
    whole = summary_of(made(output=str(tmp_path / "b")), lambda _: 1.0)
    assert "over 3 seeds;" in markdown(results_of(comparison, whole))


def test_what_base_models_lack_is_in_no_mean() -> None:
    bases = [{"loss": 2.0, "films loss": None}, {"loss": 4.0, "films loss": 1.0}, {"loss": 3.0}, {}]
    assert _by_task([{"task": "a", "base": base} for base in bases] + [{"task": "b", "base": {}}], "base") == {
        "a": {"loss": 3.0, "films loss": 1.0}
    }


def test_cases_are_told_where_all_seeds_have_as_many(tmp_path: Path) -> None:
    comparison = made(output=str(tmp_path), learning_rates=[0.1])
    lora, small = summary_of(comparison, lambda _: 1.0)
    assert lora["cases"] == small["cases"] == 3


def test_a_result_without_rows_is_told(tmp_path: Path) -> None:
    comparison = made(output=str(tmp_path), learning_rates=[0.1])
    cells = final_cells(comparison, choose(comparison, fake(lambda _: 0.0, [])))
    fake(lambda _: 1.0, [])(cells)
    cells[0].beside(".json").write_text(json.dumps({"version": 1, "failed": None, "rows": [], "columns": ["loss"]}))
    with pytest.raises(UserError, match=r"has no row of results: remove it to run the cell again"):
        run_rows(comparison, cells)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_told_and_in_no_mean(tmp_path: Path, value: float) -> None:
    comparison = made(output=str(tmp_path), learning_rates=[0.1], methods=["lora", "dora"])
    lora, dora = summary_of(comparison, lambda one: value if (one.method, one.seed) == ("dora", 1) else 1.0 + one.seed)
    assert (lora["failed"], dora["failed"]) == (None, "loss of seed 1 is no number")
    assert (dora["mean"], dora["values"], dora["metrics"]) == (2.0, {0: 1.0, 2: 3.0}, {"loss": 2.0})


def test_text_is_escaped_in_latex(tmp_path: Path) -> None:
    comparison = made(tasks={"a_b": TASK}, output=str(tmp_path), learning_rates=[1])
    text = latex(results_of(comparison, summary_of(comparison, lambda _: 1.0)))
    assert r"a\_b: loss" in text
