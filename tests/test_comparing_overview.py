"""All tasks of a comparison at once: ranks, the table, and which method they advise."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from rankwise.comparing.formats import latex, markdown, terminal_tables
from rankwise.comparing.overview import overall, overview_caption, overview_grid, overview_note, overview_of
from rankwise.comparing.statistics import spread

Scores = Mapping[tuple[str, str], Sequence[float | None]]

SCORES: Scores = {  # by task and method: seeds' scores; a loss, so that less is better, and an accuracy
    ("stories", "lora"): [2.0, 2.2],
    ("stories", "milora"): [1.9, 1.9],
    ("stories", "full"): [1.9, 1.9],
    ("stories", "bitfit"): [2.5, 2.5],
    ("stories", "prompt"): [1.0, None],
    ("maths", "lora"): [0.5, 0.7],
    ("maths", "milora"): [0.4, 0.4],
    ("maths", "full"): [0.7, 0.7],
    ("maths", "bitfit"): [0.1, 0.1],
    ("maths", "prompt"): [0.9, 0.9],
}
OTHERS = ("deviation", "difference", "p_holm", "parameters_left", "step_seconds", "peak_memory", "learning_rate")
OTHERS += ("rank", "budget", "failed")
PARAMETERS = {"lora": 200, "milora": 200, "full": 9000, "bitfit": 10, "prompt": 5}


def rows(scores: Scores = SCORES) -> list[dict[str, Any]]:
    found = []
    for (task, method), given in scores.items():
        values = {seed: value for seed, value in enumerate(given) if value is not None}
        mean = sum(values.values()) / len(values) if values else None
        metric = {"stories": "loss", "maths": "accuracy"}[task] if values else None
        row = {"task": task, "method": method, "metric": metric, "values": values}
        row |= dict.fromkeys(("mean", "low", "high"), mean) | dict.fromkeys(OTHERS)
        found.append({**row, "parameters": PARAMETERS[method] + (task == "maths")})
    return found


def results(scores: Scores = SCORES, **changes: Any) -> dict[str, Any]:
    return {"rows": rows(scores), "seeds": [0, 1], "against": "lora", "base": {}} | changes


def test_ranks_are_those_by_hand() -> None:
    """milora and full share two places on stories, full and lora on maths with seed 1; prompt lacks a seed there."""
    by_seed = {"full": [1.25, 1.5], "milora": [2.25, 2.25], "lora": [2.5, 2.25], "bitfit": [4.0, 4.0]}
    found = overview_of(results())
    assert found.ranks == {name: spread(values) for name, values in by_seed.items()}
    assert list(found.ranks) == list(by_seed) and found.methods == [*by_seed, "prompt"]
    assert overview_of(results(seeds=[0, 1, 2])).ranks == overview_of(results(rows=[])).ranks == {}


def test_seeds_are_paired_by_their_number() -> None:
    """They are texts in a file, where "10" stands before "2": with either seed another one is best."""
    scores = {("stories", "lora"): {"2": 1.0, "10": 4.0}, ("stories", "full"): {"10": 3.0, "2": 2.0}}
    found = rows({key: [0.0] for key in scores})
    for row, values in zip(found, scores.values(), strict=True):
        row["values"] = values
    assert {rank.mean for rank in overview_of(results(rows=found, seeds=[2, 10])).ranks.values()} == {1.5}


def test_of_equal_ranks_none_is_named_the_best_alone() -> None:
    """Each is best on a task; the one with fewer parameters comes first."""
    scores = {("stories", "full"): [1.0, 1.0], ("stories", "bitfit"): [2.0, 2.0]}
    scores |= {("maths", "full"): [0.1, 0.1], ("maths", "bitfit"): [0.2, 0.2]}
    found = overview_of(results(scores))
    assert list(found.ranks) == ["bitfit", "full"]
    assert overall(found) == "Over 2 tasks bitfit and full have the best mean rank, 1.5 ± 0.0 of 2."


def test_the_table() -> None:
    scores = {**SCORES, ("maths", "bitfit"): [None, None]}
    found = overview_of(results(scores))
    assert overview_grid(found) == [
        ["method", "mean rank", "stories, loss", "maths, accuracy", "parameters"],
        ["full", "1.4 ± 0.2", "1.9000", "0.7000", "9,001"],
        ["milora", "2.2 ± 0.0", "1.9000", "0.4000", "201"],
        ["lora", "2.4 ± 0.2", "2.1000", "0.6000", "201"],
        ["bitfit", "-", "2.5000", "-", "11"],
        ["prompt", "-", "1.0000, 1 of 2 seeds", "0.9000", "6"],
    ]
    assert overview_caption(found) == (
        "all tasks: a method's rank (1 is best) among the 3 that have every seed of each, mean over seeds and 2 tasks "
        "± standard deviation over 2 seeds; mean scores (of loss less is better); trained parameters, the most on any "
        "task"
    )
    assert overview_note(found).startswith(
        "Left out of the ranks, without a score of every seed on each task: bitfit, prompt. "
    )
    one_seed = overview_of(results({key: value[:1] for key, value in SCORES.items()}, seeds=[0]))
    assert [line[1] for line in overview_grid(one_seed)[1:]] == ["1.0", "2.2", "3.2", "3.5", "5.0"]
    assert "mean over 2 tasks;" in overview_caption(one_seed)


def test_what_it_advises() -> None:
    assert overall(overview_of(results())) == (
        "Over 2 tasks full has the best mean rank, 1.4 ± 0.2 of 4; next: milora (2.2 ± 0.0), lora (2.4 ± 0.2). Of "
        "the methods with at most a tenth of full's 9,001 parameters, milora has the best, 2.2 ± 0.0, with 201."
    )
    few = {key: [value[0]] for key, value in SCORES.items() if key[1] == "lora"}
    assert overall(overview_of(results(few, seeds=[0]))) == "Over 2 tasks lora alone has a score of every seed."
    none = overall(overview_of(results(seeds=[0, 1, 2])))
    assert none == "No method has a score of every seed on each task that is learned."


def test_a_task_without_scores_leaves_the_others_their_ranks() -> None:
    lost = {("maths", name): [None, None] for name in PARAMETERS}
    found = overview_of(results({**SCORES, **lost}))
    assert found.ranked == ("stories",) and list(found.ranks) == ["milora", "full", "lora", "bitfit"]
    assert overall(found).startswith("On stories milora and full have the best mean rank, 1.5 ± 0.0 of 4; next: lora")
    assert overview_note(found).startswith("Not ranked on maths, which no method is seen to learn with every seed. ")


def test_tasks_that_no_method_is_seen_to_learn_are_not_ranked() -> None:
    base = {"stories": {"loss": 3.0}, "maths": {"accuracy": 0.95}}
    assert overview_of(results(base=base)).ranked == ("stories",)
    found = overview_of(results(base=base | {"stories": {"loss": 0.5}}))
    assert found.ranked == () and found.ranks == {}
    assert overview_note(found).startswith("Not ranked on stories and maths, which no method is seen to learn")


def test_the_terminal_has_the_ranks_whole() -> None:
    """A narrow one would cut the names of methods where each of many tasks had a column."""
    file = io.StringIO()
    Console(width=80, file=file).print(terminal_tables(results())[0])
    told = file.getvalue()
    assert "full" in told and "1.4 ± 0.2" in told and "9,001" in told and "1.9000" not in told
    assert len(terminal_tables(results())) == 1 + 2
    assert markdown(results()).count("| milora | ") == latex(results()).count("milora & ") == 1 + 2
