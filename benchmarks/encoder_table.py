"""The tables of docs/results.md on encoders, from the runs that were kept.

Mean and standard deviation over seeds, and the difference from LoRA, paired by seed, with p of a t-test by Holm's
correction over the other methods. *Mean of tasks* is of a method's scores on all tasks, whatever their metrics are, and
only of methods that have every seed of each.

    python benchmarks/encoder_table.py benchmarks/results/encoders.parquet
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path

import polars as pl

from rankwise.comparing.statistics import holm, paired, spread
from timing import table

NOTHING = ["not yet", "", ""]
TASKS = {"sst2": "SST-2, accuracy", "rte": "RTE, accuracy", "mrpc": "MRPC, F1", "stsb": "STS-B, Pearson's r"}
NOISE = [f"metric: accuracy {kind}" for kind in ("characters", "dropped-words", "swapped-words")]
REVIEWS = "metric: accuracy reviews"
FIRST = "lora"
NAMES = {
    "adalora": "AdaLoRA",
    "allocating_lora": "ALoRA (allocating LoRA)",
    "bitfit": "BitFit",
    "dora": "DoRA",
    "full": "full fine-tuning",
    "houlsby": "Houlsby's adapters",
    "lora": "LoRA",
    "lora_plus": "LoRA+",
    "milora": "MiLoRA",
    "milora_dora": "MiLoRA with DoRA",
    "milora_sora": "MiLoRA with SoRA",
    "olora": "OLoRA",
    "pfeiffer": "Pfeiffer's adapters",
    "pissa": "PiSSA",
    "prefix": "prefix tuning",
    "prompt": "prompt tuning",
    "rslora": "rsLoRA",
    "sora": "SoRA",
    "sora-70": "SoRA, a budget of 70 %",
    "vera": "VeRA",
}
Scores = Mapping[str, Mapping[int, float]]  # by method, then by seed


def scores(runs: pl.DataFrame, column: str = "value") -> dict[str, dict[int, float]]:
    """Of one task's reported runs."""
    found: dict[str, dict[int, float]] = {}
    for method, seed, value in runs.select("method", "seed", column).iter_rows():
        if value is not None and math.isfinite(value):
            found.setdefault(method, {})[seed] = value
    return found


def means(tasks: Iterable[Scores]) -> dict[str, dict[int, float]]:
    """Over tasks, of each seed; of the methods that have every seed of every task."""
    tasks = list(tasks)
    seeds = {seed for task in tasks for values in task.values() for seed in values}
    whole = [name for name in NAMES if all(seeds <= task.get(name, {}).keys() for task in tasks)]
    return {name: {seed: statistics.fmean(task[name][seed] for task in tasks) for seed in seeds} for name in whole}


def cells(found: Scores) -> dict[str, list[str]]:
    """Of each method: mean and deviation, the difference from LoRA, and its p."""
    others = {name: paired(values, found[FIRST]) for name, values in found.items() if name != FIRST}
    p = dict(zip(others, holm([one.p if one else math.nan for one in others.values()]), strict=True))
    result = {}
    for name, values in found.items():
        one, other = spread(list(values.values())), others.get(name)
        score = f"{one.mean:.4f} ± {one.deviation:.4f}".replace("0.", ".")
        result[name] = [score, f"{other.mean:+.4f}" if other else "", f"{p[name]:.2g}" if other else ""]
    return result


def parameters(runs: pl.DataFrame) -> dict[str, str]:
    """What a method trains, and what is left of it in the mean."""
    found = {}
    for name, trained, left in runs.group_by("method").agg(pl.mean("parameters", "parameters_left")).iter_rows():
        found[name] = f"{trained:,.0f}" + (f", of which {left:,.0f} are left" if left is not None else "")
    return found


def in_order(overall: Scores) -> list[str]:
    """The best mean of all tasks first; behind them the methods that lack one."""
    known = sorted(overall, key=lambda name: -statistics.fmean(overall[name].values()))
    return [*known, *(name for name in NAMES if name not in overall)]


def of_tasks(found: Mapping[str, Scores]) -> str:
    """The scores."""
    overall = means(found.values())
    total, shown = cells(overall), {task: cells(values) for task, values in found.items()}
    head = ["", "mean of tasks", "minus LoRA's", "p", *(TASKS[task] for task in found)]
    lines = []
    for name in in_order(overall):
        lines.append([NAMES[name], *total.get(name, NOTHING), *(shown[task].get(name, NOTHING)[0] for task in found)])
    return table(head, lines)


def of_differences(found: Mapping[str, Scores], runs: pl.DataFrame) -> str:
    """From LoRA, task by task, and the parameters on SST-2."""
    shown, trained = {task: cells(values) for task, values in found.items()}, parameters(runs)
    head = ["", *(TASKS[task].split(",")[0] for task in found), "trained parameters, on SST-2"]
    lines = []
    for name in in_order(means(found.values())):
        if name != FIRST:
            differences = (", p ".join(shown[task].get(name, NOTHING)[1:]).rstrip(", p") for task in found)
            lines.append([NAMES[name], *differences, trained[name]])
    return table(head, lines)


def of_robustness(sst2: pl.DataFrame, order: list[str]) -> str:
    """Other sentences than those of SST-2's validation part."""
    noisy = sst2.with_columns(noise=pl.mean_horizontal(NOISE))
    shown, reviews, noise = (cells(scores(noisy, column)) for column in ("value", REVIEWS, "noise"))
    head = ["", "SST-2, accuracy", "on film reviews", "minus LoRA's", "p", "with noise", "minus LoRA's", "p"]
    return table(head, [[NAMES[name], shown[name][0], *reviews[name], *noise[name]] for name in order])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="runs.parquet of the comparison")
    runs = pl.read_parquet(parser.parse_args().runs).filter(pl.col("part") == "final")
    by_task = {task: runs.filter(pl.col("task") == task) for task in TASKS if task in set(runs["task"])}
    found = {task: scores(rows) for task, rows in by_task.items()}
    print(of_tasks(found), of_differences(found, by_task["sst2"]), sep="\n\n")
    print("", of_robustness(by_task["sst2"], in_order(means(found.values()))), sep="\n")


if __name__ == "__main__":
    main()
