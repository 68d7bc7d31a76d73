from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from rankwise.analysis import combined, result_markdown, result_table
from rankwise.analysis.columns import ABSENT, UNKNOWN, best_rows, describe, is_lower_better, write_value
from rankwise.analysis.tables import spread
from rankwise.errors import UserError

RESULTS = {
    "task": "recommend",
    "columns": ["HR@1", "valid ratio", "loss"],
    "rows": [
        {"name": "random", "metrics": {"HR@1": 0.05, "valid ratio": None, "loss": 8.25}, "cases": 610},
        {
            "name": "sft | [red]bold[/red]",
            "metrics": {"HR@1": 0.25, "valid ratio": 0.975, "loss": 2.5},
            "cases": 610,
        },
    ],
}


def text(table, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def make_run(folder: Path, recipe: str = "seed: 1\n", **metrics: float) -> Path:
    folder.mkdir()
    row = {"name": "sft", "metrics": metrics, "cases": 10}
    (folder / "results.json").write_text(json.dumps({"task": "text", "columns": ["HR@1", "loss"], "rows": [row]}))
    (folder / "recipe.yaml").write_text(recipe)
    return folder


def test_values_are_written_by_their_column():
    assert write_value("HR@1", 0.25) == "0.2500"
    assert write_value("valid ratio", 0.975) == "97.5 %"
    assert write_value("parameters", 12345) == "12,345"
    assert write_value("perplexity", 12345.678) == "12,345.7"
    assert write_value("HR@1", None) == ABSENT
    assert write_value("loss", float("nan")) == "nan"
    assert write_value("HR@1", {"mean": 0.5, "sd": 0.125, "n": 3}) == "0.5000 ± 0.1250"
    assert write_value("valid_ratio", {"mean": 0.5, "sd": 0.125, "n": 3}) == "50.0 ± 12.5 %"
    assert write_value("HR@1", {"mean": 0.5, "sd": None, "n": 1}) == "0.5000"


def test_best_is_highest_or_lowest_by_column():
    assert best_rows("HR@1", [0.1, 0.3, None, 0.3]) == {1, 3}
    assert best_rows("eval_loss", [2.0, 1.0, float("nan")]) == {1}
    assert best_rows("perplexity", [{"mean": 4.0}, {"mean": 3.0}]) == {1}
    assert best_rows("HR@1", [0.1]) == set() == best_rows("HR@1", [None, None])
    assert best_rows("something else", [0.1, 0.2]) == set() == best_rows("parameters", [1, 2])


@pytest.mark.parametrize(
    ("name", "part", "better"),
    [
        ("HR@1", "true item first", "higher"),
        ("HR@10", "first 10 of", "higher"),
        ("NDCG@5", "beyond place 5", "higher"),
        ("HR@1 (valid)", "among the valid ones", "higher"),
        ("HR@1 all", "among all cases", "higher"),
        ("valid_ratio", "exactly one candidate", "higher"),
        ("MRR", "1 / place", "higher"),
        ("held-out loss", "nats per token", "lower"),
        ("accuracy", "answered right", "higher"),
        ("ranks left", "left", None),
    ],
)
def test_definitions(name, part, better):
    assert part in describe(name).meaning
    assert describe(name).better == better


def test_which_columns_are_better_lower():
    """What a loss is of may be called like another column."""
    assert all(map(is_lower_better, ("loss", "eval_loss", "perplexity", "films loss", "log-loss", "valid loss")))
    assert not any(map(is_lower_better, ("accuracy", "HR@1", "Pearson", "maths accuracy", "ranks left", "zeal")))


def test_an_unknown_column_gets_no_invented_definition():
    assert describe("zeal").meaning == UNKNOWN


def test_console_table_is_aligned_and_keeps_markup_as_text():
    lines = text(result_table(RESULTS)).splitlines()
    assert "sft | [red]bold[/red]" in lines[3]
    assert lines[2].index("0.0500") == lines[3].index("0.2500")
    assert lines[2].index("8.2500") == lines[3].index("2.5000")
    assert "97.5 %" in lines[3] and "610" in lines[3]


def test_console_table_has_the_best_in_bold():
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="standard")
    console.print(result_table(RESULTS))
    written = console.file.getvalue()
    assert "\x1b[1m0.2500" in written and "\x1b[1m2.5000" in written
    assert "\x1b[1m0.0500" not in written and "\x1b[1m97.5 %" not in written


def test_narrow_terminals_lose_no_digit():
    written = text(result_table(RESULTS), width=30)
    assert "…" not in written
    assert sorted(filter(str.isdigit, written)) == sorted("100500825006100250097525000610")


def test_markdown():
    assert result_markdown(RESULTS) == (
        "|  | HR@1 | valid ratio | loss | cases |\n| --- | ---: | ---: | ---: | ---: |\n"
        f"| random | 0.0500 | {ABSENT} | 8.2500 | 610 |\n"
        "| sft \\| [red]bold[/red] | **0.2500** | 97.5 % | **2.5000** | 610 |\n"
    )


def test_spread_by_hand():
    """2, 4, 9 has mean 5 and squared deviations 9 + 1 + 16 = 26, over n - 1 = 2."""
    assert spread([2, 4, 9]) == {"mean": 5, "sd": pytest.approx(math.sqrt(13)), "n": 3}
    assert spread([2]) == {"mean": 2, "sd": None, "n": 1}
    assert spread([]) == {"mean": None, "sd": None, "n": 0}


def test_combined_by_hand(tmp_path):
    """HR@1 of 0.1, 0.2, 0.6: mean 0.3, sd sqrt((0.04 + 0.01 + 0.09) / 2)."""
    runs = [
        make_run(tmp_path / str(seed), f"seed: {seed}\noutput: {seed}\n", **{"HR@1": value, "loss": 2.0})
        for seed, value in enumerate([0.1, 0.2, 0.6])
    ]
    found = combined(runs)
    (row,) = found["rows"]
    assert row["metrics"]["HR@1"] == {
        "mean": pytest.approx(0.3),
        "sd": pytest.approx(math.sqrt(0.07)),
        "n": 3,
    }
    assert row["metrics"]["loss"] == {"mean": 2.0, "sd": 0.0, "n": 3}
    assert (row["cases"], row["n"], found["notes"]) == (10, 3, [])
    assert "| sft | 0.3000 ± 0.2646 | 2.0000 ± 0.0000 | 10 | 3 |" in result_markdown(found)
    assert "0.3000 ± 0.2646" in text(result_table(found))


def test_what_differs_is_told(tmp_path):
    one = make_run(tmp_path / "one", "seed: 1\nstages: [{epochs: 1}]\n", **{"HR@1": 0.1, "loss": 2.0})
    two = make_run(tmp_path / "two", "seed: 2\nstages: [{epochs: 2}]\n", **{"HR@1": 0.1})
    results = json.loads((two / "results.json").read_text())
    results["rows"][0]["cases"] = 12
    results["rows"].append({"name": "dpo", "metrics": {}})
    (two / "results.json").write_text(json.dumps(results))
    found = combined([one, two])
    assert found["notes"] == [
        "the recipes differ in stages.0.epochs",
        "dpo: in 1 of 2 runs",
        "sft: loss in 1 of 2 runs",
        "sft: 10 to 12 cases",
    ]
    assert "stages.0.epochs" in text(result_table(found)) and "- sft: 10 to 12 cases\n" in result_markdown(found)


def test_runs_that_cannot_be_combined(tmp_path):
    one = make_run(tmp_path / "one", **{"HR@1": 0.1, "loss": 2.0})
    other = make_run(tmp_path / "other", **{"HR@1": 0.1, "loss": 2.0})
    with pytest.raises(UserError, match="no runs"):
        combined([])
    with pytest.raises(UserError, match="given twice"):
        combined([one, tmp_path / "other" / ".." / "one"])
    (other / "results.json").write_text(json.dumps({"task": "text", "columns": ["HR@5"], "rows": []}))
    with pytest.raises(UserError, match=r"has columns \['HR@5'\]"):
        combined([one, other])
    (other / "results.json").unlink()
    with pytest.raises(UserError, match=r"no results\.json"):
        combined([one, other])
