"""The search of a comparison, with made-up results: what it runs, what it chooses, and what it says of that."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from rankwise.comparing.cells import Cell, Setting
from rankwise.comparing.choosing import choose
from rankwise.comparing.formats import latex, markdown, terminal_tables
from rankwise.comparing.tables import search_note
from small_comparisons import TASK, fake, made, results_of, whole_summary_of


def test_halving_keeps_the_best(tmp_path: Path) -> None:
    seen: list[list[Cell]] = []
    best = {"lora": 1e-2, "small": 1.0}
    comparison = made(output=str(tmp_path))
    run = fake(lambda one: abs(math.log(one.setting.learning_rate / best[one.method])), seen)
    assert choose(comparison, run) == {("stories", "lora"): Setting(1e-2), ("stories", "small"): Setting(1.0)}
    assert [len(cells) for cells in seen] == [8, 4]
    assert [{one.share for one in cells} for cells in seen] == [{0.25}, {0.5}]


def test_a_search_of_all_epochs_ends(tmp_path: Path) -> None:
    seen: list[list[Cell]] = []
    comparison = made(output=str(tmp_path), search={"first": 1.0})
    chosen = choose(comparison, fake(lambda one: one.setting.learning_rate, seen))
    assert set(chosen.values()) == {Setting(1e-3)}
    assert [len(cells) for cells in seen] == [8]


def test_what_failed_or_is_no_number_is_not_chosen(tmp_path: Path) -> None:
    def loss(one: Cell) -> float | None:
        return {1e-3: None, 1e-2: math.nan, 1e-1: 5.0, 1.0: 7.0}[one.setting.learning_rate]

    assert set(choose(made(output=str(tmp_path)), fake(loss, [])).values()) == {Setting(1e-1)}


def test_of_equal_scores_less_training_loss_at_the_end_decides(tmp_path: Path) -> None:
    losses = {1e-3: 0.9, 1e-2: 0.5, 1e-1: 0.7, 1.0: 0.8}

    def run(cells: Sequence[Cell]) -> None:
        fake(lambda _: 1.0, [])(cells)
        for one in cells:
            last = losses[one.setting.learning_rate]
            curve = [[step, 1 - last if step < 18 else last] for step in range(20)]
            path = one.beside(".json")
            path.write_text(json.dumps(json.loads(path.read_text()) | {"curve": curve}))

    assert set(choose(made(output=str(tmp_path)), run).values()) == {Setting(1e-2)}


def test_a_round_in_which_all_failed_is_the_last(tmp_path: Path) -> None:
    """Of ``small`` all runs fail at once, and of ``lora`` in the second round: the better of the first is taken."""
    seen: list[list[Cell]] = []

    def loss(one: Cell) -> float | None:
        return -one.setting.learning_rate if (one.method, one.share) == ("lora", 0.25) else None

    comparison = made(output=str(tmp_path), search={"first": 0.25, "factor": 2})
    chosen = choose(comparison, fake(loss, seen))
    assert chosen == {("stories", "lora"): Setting(1.0), ("stories", "small"): Setting(1e-3)}
    assert [[one.method for one in cells] for cells in seen] == [["lora"] * 4 + ["small"] * 4, ["lora"] * 2]


def test_equal_settings_are_taken_in_the_order_of_the_round_before(tmp_path: Path) -> None:
    def loss(one: Cell) -> float:
        return -one.setting.learning_rate if one.share == 0.25 else 0.0

    assert set(choose(made(output=str(tmp_path)), fake(loss, [])).values()) == {Setting(1.0)}
    assert set(choose(made(output=str(tmp_path / "b")), fake(lambda _: 1.0, [])).values()) == {Setting(1e-3)}


def test_the_mean_over_the_seeds_of_a_search_decides(tmp_path: Path) -> None:
    """The rate that is best with one seed does not learn with the other; the second best fails with it."""
    losses = {(1e-3, 0): 1.0, (1e-3, 5): 9.0, (1e-2, 0): 2.0, (1e-2, 5): None, (1e-1, 0): 4.0, (1e-1, 5): 4.5}

    def loss(one: Cell) -> float | None:
        return losses.get((one.setting.learning_rate, one.seed), 8.0)

    seen: list[list[Cell]] = []
    comparison = made(output=str(tmp_path / "two"), search={"first": 0.5, "seeds": [0, 5]})
    assert set(choose(comparison, fake(loss, seen)).values()) == {Setting(1e-1)}
    assert [len(cells) for cells in seen] == [16, 8]
    assert [(one.setting.learning_rate, one.seed) for one in seen[1][:4]] == [
        (1e-1, 0),
        (1e-1, 5),
        (1e-3, 0),
        (1e-3, 5),
    ]
    comparison = made(output=str(tmp_path / "one"), search={"first": 0.5})
    assert set(choose(comparison, fake(loss, [])).values()) == {Setting(1e-3)}


def test_a_task_can_have_its_own_seeds(tmp_path: Path) -> None:
    seen: list[list[Cell]] = []
    search = {"first": 1.0, "seeds": [3], "seeds_of": {"poems": [0, 5]}}
    comparison = made(output=str(tmp_path), tasks={"stories": TASK, "poems": TASK}, methods=["lora"], search=search)
    choose(comparison, fake(lambda one: one.setting.learning_rate, seen))
    assert [(one.task, one.seed) for one in seen[0]] == [("stories", 3)] * 4 + [("poems", 0), ("poems", 5)] * 4


def test_less_training_loss_is_a_mean_over_the_seeds_too(tmp_path: Path) -> None:
    losses = {(1e-3, 0): 0.1, (1e-3, 5): 0.9, (1e-2, 0): 0.4, (1e-2, 5): 0.4}

    def run(cells: Sequence[Cell]) -> None:
        fake(lambda _: 1.0, [])(cells)
        for one in cells:
            path = one.beside(".json")
            curve = [[1, losses.get((one.setting.learning_rate, one.seed), 0.8)]]
            path.write_text(json.dumps(json.loads(path.read_text()) | {"curve": curve}))

    comparison = made(output=str(tmp_path), search={"seeds": [0, 5]})
    assert set(choose(comparison, run).values()) == {Setting(1e-2)}


def test_one_setting_is_not_searched_for(tmp_path: Path) -> None:
    seen: list[list[Cell]] = []
    comparison = made(output=str(tmp_path), learning_rates=[0.1])
    assert set(choose(comparison, fake(lambda _: 1.0, seen)).values()) == {Setting(0.1)}
    assert seen == []


def test_what_the_search_did_not_choose_is_told(tmp_path: Path) -> None:
    """Of dora the two best are equal in both rounds, of vera all runs fail; lora's search chooses."""

    losses = {"lora": [4.0, 3.0, 2.0, 1.0], "dora": [4.0, 1.0, 3.0, 1.0]}

    def loss(one: Cell) -> float | None:
        at = [1e-3, 1e-2, 1e-1, 1.0].index(one.setting.learning_rate)
        return losses[one.method][at] if one.method in losses else None

    comparison = made(output=str(tmp_path), methods=["lora", "dora", "vera"])
    summary = whole_summary_of(comparison, loss)
    assert [(row["learning_rate"], row["undecided"]) for row in summary] == [
        (1.0, None),
        (1e-2, "2 of 4 had the same score"),
        (1e-3, "every run failed: no"),
    ]
    said = (
        "The search did not choose the setting of 2 of 3 methods (of equal ones that with the least training loss was "
        "taken, and where all failed the first listed): dora (2 of 4 had the same score); vera (every run failed: no)."
    )
    assert markdown(results_of(comparison, summary)).endswith(f"|\n\n{said}\n")
    assert f"\n\\par {said}\n\\end{{table}}" in latex(results_of(comparison, summary))
    assert str(terminal_tables(results_of(comparison, summary))[0].renderables[-1]) == said
    assert search_note(summary[:1]) == ""


def test_what_the_seeds_of_a_search_did_not_choose_is_told(tmp_path: Path) -> None:
    """Of lora two rates have the same mean, of dora each setting fails with a seed; that of vera is chosen."""

    def loss(one: Cell) -> float | None:
        rate = one.setting.learning_rate
        if one.method == "dora":
            return None if one.part == "search" and (one.seed == 5) == (rate > 1e-2) else 1.0
        if one.method == "lora" and rate in (1e-2, 1e-1):
            return 2.0 + ((one.seed == 5) == (rate == 1e-2))
        return {0: 1.0, 5: 7.0}.get(one.seed, 4.0) + rate

    comparison = made(output=str(tmp_path), methods=["lora", "dora", "vera"], search={"seeds": [0, 5]})
    summary = whole_summary_of(comparison, loss)
    assert [row["undecided"] for row in summary] == [
        "2 of 4 had the same score",
        "each setting had a run that failed: no",
        None,
    ]
