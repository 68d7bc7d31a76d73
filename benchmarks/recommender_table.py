"""The baselines on real data: what language models that recommend are to be compared with.

LastFM as the S-DPO authors publish it, and ml-latest-small, prepared as in `preference_study.py`: the same cases, the
same 20 candidates. Each baseline is trained on all training windows with three seeds, and ends training by the
validation part; nothing is chosen on test.

    export RANKWISE_DATA=../shared/data
    python benchmarks/recommender_table.py --out runs/baselines.jsonl
    python benchmarks/recommender_table.py --out runs/baselines.jsonl --table

Results are written as they come, a JSON line each; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rankwise.recommend import popularity_scores, random_scores, target_places
from rankwise.recommend.baselines.trained import BASELINES, TrainedBaseline
from rankwise.recommend.baselines.windows import Window
from rankwise.recommend.cases import intervals, means, ranked_cases
from rankwise.recommend.full_ranking import full_ranking
from rankwise.recommend.metrics import Scores
from rankwise.recommend.rows import Prepared
from result_file import Entry, ResultFile
from study_data import prepared_rows
from study_plan import SEEDS
from timing import machine, table

DATA = ("lastfm", "movielens")
COLUMNS = ("HR@1", "HR@5", "NDCG@5", "MRR", "HR@10 full", "NDCG@10 full", "coverage@10")
SEEDLESS = ("random", "popularity", "item-knn")
AT_ONCE = 256


@cache
def prepared(data: str) -> Prepared:
    return prepared_rows(data, listed=False)


def scores_of(name: str, seed: int, rows: Prepared, titles: Sequence[str]) -> Iterator[Scores]:
    """Of each test case, the score of every title."""
    if name in ("random", "popularity"):
        [same] = random_scores([titles]) if name == "random" else popularity_scores([titles], rows.popularity)
        yield from (same for _ in rows.test)
        return
    parts = rows.train, rows.validation
    windows = ([Window(row["user"], row["history"], row["target"]) for row in part] for part in parts)
    baseline = TrainedBaseline(name, titles, seed).fit(*windows)
    histories = [row["history"] for row in rows.test]
    for start in range(0, len(histories), AT_ONCE):
        yield from baseline.scores(histories[start : start + AT_ONCE])


def measure(data: str, name: str, seed: int) -> Entry:
    """Train and measure on test: 20 candidates, and the whole catalogue."""
    rows = prepared(data)
    titles = sorted({*rows.catalogue, *rows.items["title"]})
    places = {title: place for place, title in enumerate(titles)}
    begun = time.process_time()
    scores = list(scores_of(name, seed, rows, titles))
    seconds = time.process_time() - begun
    picked = [one[[places[title] for title in row["candidates"]]] for one, row in zip(scores, rows.test, strict=True)]
    targets = [row["target"] for row in rows.test]
    at = target_places([row["candidates"] for row in rows.test], targets)
    users = [str(row["user"]) for row in rows.test]
    cases = ranked_cases(users, targets, picked, at, rows.popularity)
    full, _ = full_ranking(rows.test, titles, rows.popularity, enumerate(scores))
    return {
        "data": data,
        "name": name,
        "seed": seed,
        "cases": len(rows.test),
        "titles": len(titles),
        "metrics": means(cases) | full,
        "intervals": intervals(cases),
        "seconds": round(seconds, 1),
    }


def report(entries: Sequence[Entry], data: str) -> str:
    """Means over the seeds with their range; HR@1 with the interval over cases of the first seed."""
    found: dict[str, list[Entry]] = {}
    for one in entries:
        if one["data"] == data:
            found.setdefault(one["name"], []).append(one)
    rows = []
    for name, group in found.items():
        low, high = group[0]["intervals"]["HR@1"]
        cells = [_over_seeds([one["metrics"].get(column, float("nan")) for one in group]) for column in COLUMNS]
        seconds = f"{statistics.median(one['seconds'] for one in group):.0f} s"
        rows.append([name, str(len(group)), cells[0], f"{low:.3f} to {high:.3f}", *cells[1:], seconds])
    first = next(iter(found.values()))[0]
    head = ["", "seeds", "HR@1", "95 % over cases", *COLUMNS[1:], "training and scoring"]
    return f"{data}: {first['cases']} cases of test, {first['titles']} titles\n\n{table(head, rows)}\n"


def _over_seeds(values: Sequence[float]) -> str:
    mean, spread = statistics.mean(values), max(values) - min(values)
    return f"{mean:.3f}" + (f" (range {spread:.3f})" if spread else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file of results, made or continued")
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), help="(all)")
    parser.add_argument("--table", action="store_true", help="print the tables of a file of results only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = ResultFile(options.out)
    if not options.table:
        if not results.lines:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps({"machine": machine(1)}) + "\n", encoding="utf-8")
        _measure_all(results, options.data)
    print("\n".join(report(results.entries, data) for data in options.data))


def _measure_all(results: ResultFile, wanted: Sequence[str]) -> None:
    done = {(one["data"], one["name"], one["seed"]) for one in results.entries}
    for data in wanted:
        for name in ("random", "popularity", *BASELINES):
            for seed in SEEDS[:1] if name in SEEDLESS else SEEDS:
                if (data, name, seed) not in done:
                    results.add(measure(data, name, seed))
                    print(data, name, seed, _line(results.entries[-1]["metrics"]), flush=True)


def _line(metrics: dict[str, Any]) -> str:
    return ", ".join(f"{name} {metrics[name]:.4f}" for name in ("HR@1", "MRR") if np.isfinite(metrics[name]))


if __name__ == "__main__":
    main()
