"""The page of a comparison: what it advises, shows, escapes and sorts."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

import small_runs
from page_checks import NEEDS_CHROMIUM, Page, check_accessible, check_on_a_phone, drawn, page_in
from rankwise.cli import main
from rankwise.comparing import compare as comparing
from rankwise.comparing.advice import advice, forgotten_metrics, qualified
from rankwise.comparing.cells import Cell
from rankwise.comparing.figures import search_figure, unbeaten
from rankwise.comparing.report import render_comparison, write_comparison_report
from rankwise.comparing.statistics import spread
from rankwise.errors import UserError
from small_comparisons import TASK, fake, made

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Those of a comparison on two tasks whose runs are made up."""
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("A text.", encoding="utf-8")
    data = {"kind": "text", "train": str(tmp_path / "a.txt"), "validation": str(tmp_path / "b.txt")}
    tasks = {"stories": TASK | {"data": data}, "maths": TASK | {"data": data, "name": "m"}}
    comparison = made(
        name=f"small {EVIL}",
        methods=["lora", "milora", "full", "bitfit"],
        tasks={name: {key: value for key, value in task.items() if key != "name"} for name, task in tasks.items()},
        learning_rates=[1e-3, 1e-2],
        output=str(tmp_path / "out"),
    )

    def loss(cell: Cell) -> float | None:
        noise = random.Random(f"{cell.method} {cell.seed}").gauss(0, 0.01)
        means = {"lora": 2.0, "milora": 1.9, "full": 1.9}
        return means[cell.method] + noise if cell.method != "bitfit" else None

    def run(cells: Any, processes: int, keep: bool, told: Any, cluster: bool) -> None:
        fake(loss, [])(cells)
        for cell in cells:
            path = cell.beside(".json")
            kept = json.loads(path.read_text())
            kept["parameters"] = {"lora": 200, "milora": 200, "full": 9000, "bitfit": None}[cell.method]
            kept |= {"curve": [[1, 4.0], [9, 2.0]], "ranks": {"layers.0": 8} if cell.method != "full" else {}}
            kept["rows"][-1]["training_metrics"] = {"loss": 1.0}
            kept["rows"][-1]["metrics"]["films loss"] = {"lora": 2.5, "milora": 2.2, "full": 3.0, "bitfit": 2.0}[
                cell.method
            ]
            if cell.recipe.evaluation.base:
                kept["rows"].insert(0, {"name": "base model", "metrics": {"loss": 3.0, "films loss": 2.0}})
            path.write_text(json.dumps(kept))

    monkeypatch.setattr(comparing, "run_cells", run)
    return comparing.compare(comparison, small_runs.silent())


def test_what_it_advises(results: dict[str, Any]) -> None:
    said = advice(results, "stories")
    best = min(("milora", "full"), key=lambda name: next(r["mean"] for r in results["rows"] if r["method"] == name))
    assert said.startswith(f"stories: {best} has the best mean loss")


def scored(
    metric: str = "accuracy", parameters: Any = None, cases: int | None = None, **values: list[float | None]
) -> dict[str, Any]:
    """What a summary holds of methods with these scores by seed; None where a run failed."""
    rows = []
    for method, given in values.items():
        known = {seed: value for seed, value in enumerate(given) if value is not None}
        found = spread(list(known.values()))._asdict() if known else dict.fromkeys(("mean", "low", "high"))
        row = {"task": "a", "method": method, "metric": metric if known else None, "values": known, **found}
        rows.append({**row, "parameters": (parameters or {}).get(method, 100), "cases": cases, "metrics": {}})
    seeds = list(range(max(map(len, values.values()))))
    return {"rows": rows, "seeds": seeds, "base": {}, "comparison": {}}


def test_one_seed_tells_nothing() -> None:
    assert advice(scored(lora=[0.7], full=[0.6]), "a") == (
        "a: lora has the best accuracy, 0.7; one seed tells no differences."
    )


def test_a_method_that_lacks_seeds_is_not_named_the_best() -> None:
    """full is better on the mean of its two seeds, and worse on each of them."""
    found = scored(full=[None, 0.70, 0.71], lora=[0.60, 0.75, 0.76], bitfit=[None] * 3)
    assert advice(found, "a") == "a: lora has accuracy, 0.7033, and no other method gave a score of every seed."
    assert qualified(found, "a") == [
        "Left out, without a score of every seed: full (2 of 3 seeds), bitfit (0 of 3 seeds)."
    ]
    found = scored(lora=[0.80, 0.81, 0.82], dora=[0.5, 0.51, 0.52], full=[None, None, 0.83])
    assert advice(found, "a") == (
        "a: lora has the best mean accuracy, 0.81, with 100 parameters, and 3 seeds tell every other method apart from "
        "it (paired tests)."
    )
    assert advice(scored(lora=[0.7, None], full=[None, 0.6]), "a") == "a: no method gave a score of every seed."
    assert advice(scored(lora=[None, None]), "a") == "a: no method gave a score."


def test_one_method_is_better_than_none() -> None:
    assert (
        advice(scored(lora=[0.7, 0.8]), "a")
        == "a: lora has accuracy, 0.75, and no other method gave a score of every seed."
    )


def test_a_difference_that_is_the_same_at_every_seed_is_told_apart() -> None:
    found = scored(lora=[1.0, 1.0, 1.0], bitfit=[0.5, 0.5, 0.5], parameters={"lora": 3000, "bitfit": 10})
    assert advice(found, "a").startswith(
        "a: lora has the best mean accuracy, 1, with 3,000 parameters, and 3 seeds tell"
    )
    same = scored(lora=[0.5, 0.6], bitfit=[0.5, 0.6], parameters={"lora": 3000, "bitfit": 10})
    assert advice(same, "a") == (
        "a: lora has the best mean accuracy, 0.55, with 3,000 parameters. 2 seeds do not tell 1 more apart from it "
        "(paired tests)."
    )
    assert qualified(same, "a") == [
        "Of the methods with at most a tenth of lora's parameters, bitfit has the best mean, 0.55."
    ]


def test_differences_that_other_cases_may_turn_are_told() -> None:
    """Of 100 cases an accuracy of 0.8 has sqrt(0.8 * 0.2 / 100) = 0.04."""
    scores = {"lora": [0.8, 0.8], "full": [0.77, 0.77], "dora": [0.75, 0.75]}
    said = "On 100 cases accuracy has a standard error of 0.04: the difference from the best is less for 1 of 2 others."
    assert qualified(scored(cases=100, **scores), "a")[0] == said
    assert qualified(scored(cases=10_000, **scores), "a") == qualified(scored(**scores), "a") == []
    assert qualified(scored("loss", cases=100, **scores), "a") == []


def test_what_was_forgotten_of_tasks_is_matched_exactly() -> None:
    found = scored(lora=[0.7, 0.8])
    names = (
        "accuracy",
        "maths hard loss",
        "maths hard accuracy",
        "maths hard answered",
        "maths accuracy",
        "maths answered",
    )
    found["rows"][0]["metrics"] = dict.fromkeys(names, 0.5) | {"maths hard written": None}
    asked = {"texts": {"maths hard": "a.txt"}, "tasks": {"maths hard": {}, "maths": {}}}
    found["comparison"] = {"tasks": {"a": {"evaluation": asked}}}
    assert forgotten_metrics(found, "a", found["rows"]) == ["maths hard loss", "maths hard accuracy", "maths accuracy"]


def test_the_page_is_whole(results: dict[str, Any], tmp_path: Path) -> None:
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page == render_comparison(json.loads((tmp_path / "out" / "summary.json").read_text()))
    assert page.count("<script>alert") == 0
    assert "&lt;script&gt;alert(1)" in page
    tasks = [{**row, "task": f'"{EVIL}'} for row in results["rows"]]
    assert render_comparison(results | {"rows": tasks}).count("<script>alert") == 0
    without_scripts = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", without_scripts)
    assert (
        page.count('class="scroll sortable"') == 1 + 2 * 2
    )  # all tasks; of each the scores, and all that was measured
    assert page.count('scope="row">before training</th>') == 2
    assert "Learning curves" in page and "Directions by layer" in page and "Memorisation and generalisation" in page
    assert "milora forgets least (+0.2000 nats), full most (+1.0000)" in page
    assert "bitfit: no" in page
    lead = page.index("Over 2 tasks ")
    assert lead < page.index('<section id="all-tasks"') < page.index("stories: ") < page.index("maths: ")
    assert (tmp_path / "out" / "table.md").read_text().startswith("**all tasks: ")
    assert (tmp_path / "out" / "table.tex").read_text().count(r"\begin{table}") == 1 + 2
    assert (tmp_path / "out" / "report.html").stat().st_size < 6e6


def test_the_command_writes_it_again(results: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "out" / "report.html"
    before = page.read_text()
    page.unlink()
    assert main(["report", str(tmp_path / "out")]) == 0
    assert page.read_text() == before
    (tmp_path / "out" / "summary.json").write_text(json.dumps(results | {"version": 99}))
    with pytest.raises(UserError, match="is of version 99, and this is 1: run `rankwise compare` again"):
        write_comparison_report(tmp_path / "out")
    (tmp_path / "out" / "summary.json").write_text("{}")
    with pytest.raises(UserError, match="is of version None"):
        write_comparison_report(tmp_path / "out")
    (tmp_path / "out" / "summary.json").write_text("[]")
    with pytest.raises(UserError, match=r"summary.json holds no JSON object: run `rankwise compare` again"):
        write_comparison_report(tmp_path / "out")


@pytest.mark.parametrize(("metric", "front"), [("loss", [0, 1, 4]), ("accuracy", [0, 2])])
def test_a_front_has_what_is_not_beaten_in_both(metric: str, front: list[int]) -> None:
    points = [(1.0, 5.0), (2.0, 4.0), (2.0, 6.0), (3.0, 4.5), (4.0, 1.0), (None, 9.0)]
    rows = [{"mean": y, "metrics": {"films loss": x}} for x, y in points]
    assert unbeaten(rows, metric, "films loss", 0.5) == [rows[at] for at in front]
    assert unbeaten([], metric, "films loss", 0.5) == []
    twins = [rows[0], {**rows[0]}]
    assert unbeaten(twins, metric, "films loss", 0.5) == twins


def test_few_parameters_and_little_forgotten_are_told(results: dict[str, Any]) -> None:
    for row in results["rows"]:
        if row["method"] in ("milora", "full"):
            row["mean"] = {"milora": 1.9, "full": 1.8}[row["method"]]
            row["values"] = {seed: row["mean"] + seed * row["mean"] ** 9 / 1e5 for seed in range(3)}
    assert qualified(results, "stories") == [
        "Left out, without a score of every seed: bitfit (0 of 3 seeds).",
        "Of the methods with at most a tenth of full's parameters, milora has the best mean, 1.9.",
        "By the means not beaten in both score and what is forgotten of films: milora, full, what forgets least first.",
    ]
    assert qualified(results | {"rows": []}, "stories") == []


def test_a_task_on_which_none_is_seen_to_beat_the_most_frequent_label_is_told(results: dict[str, Any]) -> None:
    for row in results["rows"]:
        row["metric"] = "accuracy"
    results["base"]["stories"]["accuracy"] = 1.0  # than which all methods' intervals are better
    results["frequent"] = {"stories": {"accuracy": 1.1}}
    assert not any("none is seen to learn" in sentence for sentence in qualified(results, "stories"))
    results["frequent"] = {"stories": {"accuracy": 4.0}}
    said = "No method's 95 % interval is better than the most frequent label's, 4: none is seen to learn this task."
    assert said in qualified(results, "stories")
    assert "The most frequent label of the training rows, always: accuracy 4." in render_comparison(results)


@pytest.mark.parametrize(("metric", "worse", "better"), [("loss", 1.0, 4.0), ("accuracy", 4.0, 1.0)])
def test_a_task_that_none_is_seen_to_learn_is_told(
    results: dict[str, Any], metric: str, worse: float, better: float
) -> None:
    for row in results["rows"]:
        row["metric"] = metric
    results["base"]["stories"][metric] = better  # than which all methods' intervals are better
    assert not any("none is seen to learn" in sentence for sentence in qualified(results, "stories"))
    results["base"]["stories"][metric] = worse
    said = f"No method's 95 % interval is better than the score before any training, {worse:.4g}: none is seen to learn"
    assert qualified(results, "stories")[1].startswith(said)
    for row in results["rows"]:
        row |= {"low": None, "high": None, "values": {0: 2.0} if row["values"] else {}}
    one_seed = results | {"seeds": [0]}
    assert not any("none is seen to learn" in sentence for sentence in qualified(one_seed, "stories"))


def test_what_could_not_be_measured_is_not_drawn(results: dict[str, Any]) -> None:
    for row in results["rows"]:
        row["metrics"]["films loss"] = None
    assert "What was learnt, and what was forgotten" not in render_comparison(results)


def test_a_page_tells_what_its_means_and_choices_stand_on(results: dict[str, Any]) -> None:
    page = render_comparison(results)
    assert "the search: settings are chosen on rows held out" in page and "rounds of the search" not in page
    assert (
        "The search did not choose the setting of 4 of 4 methods (of equal ones that with the least training loss"
        in page
    )
    assert "lora, milora, full (2 of 2 had the same score); bitfit (every run failed: no)." in page
    full = next(row for row in results["rows"] if row["method"] == "full")
    del full["values"][0]
    results["search"] += [row | {"share": 0.5} for row in results["search"]]
    page = render_comparison(results)
    assert ", 2 of 3 seeds</td>" in page and "Left out, without a score of every seed: full (2 of 3 seeds)" in page
    assert "full (2 of 3 seeds)" in json.dumps(Page(page).figures["stories-scores"])
    assert "the first of 2 rounds of the search" in page
    assert "runs that it found finished may stand on other versions" in page and "Not the same for all" not in page
    results["mixed"] = {"processor": {"<A>": 1200, "B": 1}}
    said = "Not the same for all runs: processor &lt;A&gt; (1,200 runs), B (1 run)."
    assert said in render_comparison(results)


def test_names_that_look_alike_are_told_apart(results: dict[str, Any]) -> None:
    """A task that is called like a section of the page, and texts whose names differ by a sign."""
    for row in results["rows"]:
        row["task"] = {"stories": "versions", "maths": "Versions"}[row["task"]]
        row["metrics"] |= {"my text loss": 1.0, "my-text loss": 2.0} if row["metrics"] else {}
    results["base"] = {"versions": {"my text loss": 0.0, "my-text loss": 0.0}}
    page = Page(render_comparison(results))
    check_accessible(page)
    mine = [figure["data"][0]["x"] for name, figure in page.figures.items() if name.startswith("versions-my")]
    assert mine == [[1.0] * 3, [2.0] * 3]


def test_the_search_shows_its_first_round_and_the_best_rank() -> None:
    rows = [
        {"method": "lora", "learning_rate": 0.1, "rank": rank, "budget": None, "share": share, "value": value}
        for rank, share, value in ((2, 0.25, 3.0), (4, 0.25, 2.0), (4, 0.5, 1.0))
    ]
    figure = search_figure(rows, "loss")
    assert figure is not None
    assert list(figure.data[0].y) == [2.0]
    figure = search_figure([*rows, *(row | {"value": row["value"] + 2.0} for row in rows[:2])], "loss")
    assert figure is not None
    assert list(figure.data[0].y) == [3.0]  # means over two seeds
    figure = search_figure([*rows, rows[1] | {"value": None}], "loss")
    assert figure is not None
    assert list(figure.data[0].y) == [3.0]  # a rank that failed with one of them has none
    assert search_figure([], "loss") is None


def test_it_is_accessible(results: dict[str, Any], tmp_path: Path) -> None:
    page = page_in(tmp_path / "out" / "report.html")
    check_accessible(page)
    assert len(page.having("table")) == 1 + 2 * 2 + 2  # all tasks; of each; runs and versions


@NEEDS_CHROMIUM
def test_it_is_no_wider_than_a_phone(results: dict[str, Any], tmp_path: Path) -> None:
    check_on_a_phone(tmp_path / "out" / "report.html", tmp_path / "profile")


@NEEDS_CHROMIUM
def test_a_browser_draws_and_sorts_it(results: dict[str, Any], tmp_path: Path) -> None:
    button = "document.querySelectorAll('.sortable')[1].querySelectorAll('thead button')[5]"
    other = "document.querySelectorAll('.sortable')[3].querySelectorAll('thead button')[1]"  # another task's scores
    click = f"<script>for (const one of [{button}, {other}]) {{one.click(); one.click();}}</script>"  # up, then down
    page = drawn(tmp_path / "out" / "report.html", tmp_path / "profile", script=click)
    assert page.count('class="plot js-plotly-plot"') == 2 * (4 + 3)
    first, _, third = [re.findall(r'<th scope="row">(\w+)</th>', body) for body in page.split("<tbody>")[2:5]]
    assert (first[0], first[-1]) == ("full", "bitfit")  # by parameters, the largest of them; what has none is last
    assert (third[0], third[-1]) == ("lora", "bitfit")  # by score; so is what was not possible
    assert 'aria-sort="descending"' in page
    assert math.isfinite(results["rows"][0]["mean"])
