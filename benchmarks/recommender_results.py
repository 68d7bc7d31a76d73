"""Every recommender on the test cases of both data sets in one table, from the runs that the studies kept.

    python benchmarks/recommender_results.py

reads `results/recommender_baselines.jsonl` and `results/preference.jsonl` beside it. A number is the mean over the
seeds, and its interval the mean of the seeds' 95 % intervals: by a bootstrap over the cases where each case's rank is
known, else as the run kept it, and Wilson's for the shares of the papers' protocols (right over all answers, right over
valid ones).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from scipy.stats import binomtest

from rankwise.recommend.uncertainty import mean_interval
from timing import table

RESULTS = Path(__file__).parent / "results"
RANKING = ("HR@1", "HR@5", "NDCG@5", "MRR")
RIGHT, OF_VALID, VALID = "HR@1 greedy", "HR@1 greedy of valid", "valid ratio"
HEAD = ["recommender", "seeds", *RANKING, "right over all", "right over valid", "valid"]
Ends = tuple[float, float, float]  # a mean, and its interval's ends


def lines(name: str) -> list[dict[str, Any]]:
    """The runs of a file, whose first line is the machine."""
    return [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()[1:]]


def of_ranks(ranks: Sequence[int]) -> dict[str, Ends]:
    """The ranking metrics of the true items' places."""
    places = np.array(ranks, dtype=float)
    gain = 1 / np.log2(places + 1)
    values = {"HR@1": places == 1, "HR@5": places <= 5, "NDCG@5": np.where(places <= 5, gain, 0.0), "MRR": 1 / places}
    found = {name: mean_interval(value.astype(float)) for name, value in values.items()}
    return {name: (float(values[name].mean()), one.low, one.high) for name, one in found.items()}


def of_protocol(metrics: Mapping[str, float], cases: int) -> dict[str, Ends]:
    """The shares of what was written freely; none of valid answers where there was none."""
    if RIGHT not in metrics:
        return {}
    right, valid = round(metrics[RIGHT] * cases), round(metrics[VALID] * cases)
    shares = {RIGHT: (right, cases), VALID: (valid, cases)} | ({OF_VALID: (right, valid)} if valid else {})
    found = {name: binomtest(*share).proportion_ci(method="wilson") for name, share in shares.items()}
    return {name: (share[0] / share[1], found[name].low, found[name].high) for name, share in shares.items()}


def name_of(run: Mapping[str, Any]) -> str:
    """A language model's training in words."""
    if run["start"] == "base":
        return "the shipped model, untrained"
    trained = "24,000 supervised rows" + (", then 4,000 with the list" if run["listed"] else "")
    if run["kind"] == "measure":
        return trained
    if run["kind"] == "more":
        return f"{trained}; supervised on as many tokens as {run['rows']:,} preference rows"
    method = "DPO" if run["negatives"] == 1 else f"softmax-DPO, K = {run['negatives']}"
    return f"{trained}; {method}, {run['rows']:,} rows at {run['rate']:g}"


def measured() -> dict[str, dict[str, list[dict[str, Ends]]]]:
    """For each data set and model, the metrics of its seeds."""
    found: dict[str, dict[str, list[dict[str, Ends]]]] = {}
    for line in lines("recommender_baselines.jsonl"):
        known = {name: (line["metrics"][name], *line["intervals"][name]) for name in RANKING}
        found.setdefault(line["data"], {}).setdefault(line["name"], []).append(known)
    for line in lines("preference.jsonl"):
        run = line["run"]
        if run["split"] == "test" and run["start"] != "popularity":
            known = of_ranks(line["ranks"]) | of_protocol(line["metrics"], line["cases"])
            assert abs(known["MRR"][0] - line["metrics"]["MRR"]) < 0.01  # ties count by halves there
            found[run["data"]].setdefault(name_of(run), []).append(known)
    return found


def cell(seeds: Sequence[Mapping[str, Ends]], name: str) -> str:
    """The mean over the seeds that have the metric, with the mean of the intervals' ends."""
    known = [seed[name] for seed in seeds if name in seed]
    if not known:
        return "-"
    mean, low, high = (fmean(one[at] for one in known) for at in range(3))
    return f"{mean:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    """Print a table for each data set."""
    for data, models in measured().items():
        names = (*RANKING, RIGHT, OF_VALID, VALID)
        rows = [[model, str(len(seeds)), *(cell(seeds, name) for name in names)] for model, seeds in models.items()]
        print(f"{data}\n\n{table(HEAD, rows)}\n")


if __name__ == "__main__":
    main()
