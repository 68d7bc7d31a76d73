"""The tables of `glue_ranks.py`."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

from timing import table

Entry = dict[str, Any]
LORA_PARAMETERS = 331_776  # at rank 8
TASKS = ("rte", "mrpc", "stsb")
SWEEP_TASKS = ("mrpc", "stsb")  # after one pass over RTE, LoRA is at chance: it tells no rate from another
MEASURES = {"rte": ("accuracy",), "mrpc": ("accuracy", "f1"), "stsb": ("spearman", "pearson")}


def score(entry: Entry, rows: str = "") -> float:
    """The mean of a run's measures on its split, or on other rows; -inf where the training broke down."""
    found = entry[f"{rows or entry['split']}_scores"]
    return -math.inf if found is None else statistics.mean(found[name] for name in MEASURES[entry["task"]])


def mean_score(entries: Sequence[Entry], tasks: Sequence[str] = TASKS) -> float:
    """Over the tasks, all of which have to be there."""
    return statistics.mean(score(one) for one in entries) if len(entries) == len(tasks) else -math.inf


def by_rate(entries: Sequence[Entry], method: str) -> dict[float, list[Entry]]:
    """The sweep of a method: each rate's runs, in the order of the tasks."""
    chosen = [one for one in entries if (one["split"], one["method"]) == ("validation", method)]
    chosen.sort(key=lambda one: (one["rate"], TASKS.index(one["task"])))
    return {rate: list(runs) for rate, runs in itertools.groupby(chosen, key=lambda one: one["rate"])}


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean, and standard deviation of several."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def methods_of(entries: Sequence[Entry]) -> list[str]:
    return list(dict.fromkeys(one["method"] for one in entries))


def sweep_table(entries: Sequence[Entry]) -> str:
    """Score of each task at each rate; the best mean of each method in bold."""
    rows = []
    for method in methods_of(entries):
        found = by_rate(entries, method)
        best = max(found, key=lambda rate: mean_score(found[rate], SWEEP_TASKS), default=None)
        for rate, runs in found.items():
            scores = {one["task"]: score(one) for one in runs}
            cells = [f"{scores[task]:.3f}" if task in scores else "-" for task in SWEEP_TASKS]
            mean = f"{mean_score(runs, SWEEP_TASKS):.4f}" if len(runs) == len(SWEEP_TASKS) else "-"
            rows.append([method, f"{rate:g}", *cells, f"**{mean}**" if rate == best and mean != "-" else mean])
    return table(["", "rate", *SWEEP_TASKS, "mean"], rows)


def dev_table(entries: Sequence[Entry], task: str) -> str:
    """Each method on dev: every measure over seeds, the seeds' scores, the score on 500 rows of train, and the cost."""
    rows = []
    for method in methods_of(entries):
        runs = [one for one in entries if (one["split"], one["method"], one["task"]) == ("dev", method, task)]
        whole = [one for one in runs if one["dev_scores"] is not None]
        if not whole:
            continue
        start, end = (round(statistics.mean(one[f"parameters_{when}"] for one in whole)) for when in ("start", "end"))
        share = f" ({end / LORA_PARAMETERS:.0%} of LoRA)"
        rows.append(
            [
                method,
                ", ".join(f"{rate:g}" for rate in sorted({one["rate"] for one in whole})),
                (f"{start:,}" if start == end else f"{start:,} to {end:,}") + share,
                f"{len(whole)} of {len(runs)}",
                *(spread([one["dev_scores"][name] for one in whole]) for name in MEASURES[task]),
                ", ".join(f"{score(one):.3f}" for one in runs),
                spread([score(one, "sample") for one in whole]),
                f"{statistics.median(one['step_ms']['all'] for one in whole):.0f} ms",
                f"{statistics.median(one['seconds']['training'] for one in whole):.0f} s",
                f"{max(one['peak_mib'] for one in whole)} MiB",
            ]
        )
    cost = ["step, not in turns", "training", "peak memory"]
    return table(["", "rate", "parameters", "whole runs", *MEASURES[task], "each seed", "on train", *cost], rows)


def mean_table(entries: Sequence[Entry]) -> str:
    """The mean over the tasks, for each seed that has them all, and its difference from LoRA's of the same seed."""
    runs = [one for one in entries if one["split"] == "dev"]
    runs.sort(key=lambda one: (one["method"], one["seed"]))
    grouped = itertools.groupby(runs, key=lambda one: (one["method"], one["seed"]))
    means = {key: mean_score(list(group)) for key, group in grouped}
    means = {key: mean for key, mean in means.items() if math.isfinite(mean)}
    rows = []
    for method in methods_of(entries):
        found = {seed: mean for (name, seed), mean in means.items() if name == method}
        if found:
            paired = [mean - means["lora", seed] for seed, mean in found.items() if ("lora", seed) in means]
            against = spread(paired) if paired and method != "lora" else "-"
            rows.append([method, spread([*found.values()]), ", ".join(f"{one:.3f}" for one in found.values()), against])
    return table(["", "mean of tasks", "each seed", "minus LoRA's"], rows)


def rank_table(entries: Sequence[Entry]) -> str:
    """The mean rank of each kind of layer at the end, where ranks were chosen."""
    rows, kinds = [], ["query", "key", "value", "attention.output", "intermediate", "output"]
    for method, task in itertools.product(methods_of(entries), TASKS):
        runs = [one for one in entries if (one["split"], one["method"], one["task"]) == ("dev", method, task)]
        ranks = [item for one in runs for item in one.get("ranks", {}).items()]
        if method == "lora-small" or not any(rank != ranks[0][1] for _, rank in ranks):
            continue
        found: dict[str, list[int]] = {kind: [] for kind in kinds}
        for name, rank in ranks:
            found[kind_of(name)].append(rank)
        rows.append([method, task, *(f"{statistics.mean(found[kind]):.1f}" for kind in kinds)])
    return table(["", "task", *kinds], rows)


def kind_of(name: str) -> str:
    """Such as ``query`` of ``layer.0.attention.self.query``, and ``output`` of ``layer.0.output.dense``."""
    parts = name.removesuffix(".dense").split(".")
    return "attention.output" if parts[-2:] == ["attention", "output"] else parts[-1]


def report(lines: Sequence[Entry]) -> str:
    """All that there is so far."""
    if not lines:
        return "no runs yet"
    entries = lines[1:]
    parts = [", ".join(f"{name} {value}" for name, value in lines[0].items())]
    parts += [f"sweep: score on the held-out tenth of train\n\n{sweep_table(entries)}"]
    parts += [f"{task} on dev\n\n{dev_table(entries, task)}" for task in TASKS]
    parts += [f"means on dev\n\n{mean_table(entries)}", f"mean rank at the end\n\n{rank_table(entries)}"]
    return "\n\n".join(parts)
