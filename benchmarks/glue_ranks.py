"""How many directions, on real tasks: SoRA against full fine-tuning, BitFit, LoRA, AdaLoRA and ALoRA.

all-MiniLM-L6-v2 with a new head learns RTE, MRPC and STS-B. Each method gets its own learning rate from a sweep with
one more seed, by the mean score of MRPC and STS-B on a tenth of train that is held out; the sweep is extended until the
best rate has a worse one on either side. Then it learns from all of train with several seeds, and dev is scored
once, at the end. Batches, schedule, weight decay and clipping are common to all, and so is the head, which all train;
nothing is dropped out.

The adapters are on every linear layer of attention and feed-forward. SoRA begins at rank 8 and is given 70% of the
parameters of LoRA at rank 8; AdaLoRA begins at 8 and ends with 70% of the directions; ALoRA, which keeps its total,
begins with 6 in attention and 5 in feed-forward (71% of the directions, 68% of the parameters) and scores them on 32
rows of train that it does not learn from. ``lora-small`` begins so too and stays there: what the choice of ranks adds.

    RANKWISE_DATA=../shared/data OMP_NUM_THREADS=1 python benchmarks/glue_ranks.py --out runs/glue.jsonl
    python benchmarks/glue_ranks.py --out runs/glue.jsonl --table

Results are written as they come, and the same command goes on where it was stopped; several commands may write one
file where their methods differ. Each run has a process of its own, so that its peak memory is its own. Step times are
of runs that may be hours apart: compare methods by a benchmark that takes them in turns.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from glue_tables import SWEEP_TASKS, TASKS, Entry, by_rate, mean_score, report
from result_file import ResultFile
from timing import machine

# Where the sweep of each method begins.
RATES = {
    "lora": (3e-4, 1e-3, 3e-3),
    "sora": (3e-4, 1e-3, 3e-3),
    "adalora": (1e-3, 3e-3, 1e-2),
    "alora": (3e-4, 1e-3, 3e-3),
    "bitfit": (1e-3, 3e-3, 1e-2),
    "full": (3e-5, 1e-4, 3e-4),
    "lora-small": (3e-4, 1e-3, 3e-3),
}
SWEEP_SEED = 100
# Times --epochs, in the runs on dev. STS-B has as many rows as the two others together. RTE has no more than MRPC: on a
# held-out tenth (LoRA, rate 1e-3) twice as many gave an accuracy of 0.582 for 0.554, with an error of 0.03, and a loss
# of 1.12 for 0.69.
PASSES = {"stsb": 0.5}
KEPT = ("epochs", "sweep_epochs", "batch", "precision", "threads", "passes")
TRAIN_ROWS = {"rte": 2490, "mrpc": 3668, "stsb": 5749}
# For an estimate before the first run: seconds of a step of 16 rows, of starting and measuring a run, and of ALoRA's
# scoring of directions in one, on one core of the machine in docs/log.md.
STEP_SECONDS = {"rte": 0.6, "mrpc": 0.5, "stsb": 0.3}
RUN_SECONDS, ALLOCATION_SECONDS = 25, 180


class Results(ResultFile):
    """Finished runs, a JSON line each after a first one with the settings; a finished run is not run again."""

    def open(self, settings: Entry) -> None:
        """Write the settings of a new file; those of an old one must be the same."""
        found = self.lines
        if not found:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.add(settings)
        elif found[0] != json.loads(json.dumps(settings)):
            raise SystemExit(f"{self.path} holds runs with other settings ({found[0]}): give another --out")

    def find(self, spec: Entry) -> Entry | None:
        """The run with the same split, method, task, rate, seed, epochs and batch, if it is there."""
        wanted = ("split", "method", "task", "rate", "seed", "epochs", "batch")
        return next((one for one in self.entries if all(one[name] == spec[name] for name in wanted)), None)

    def get(self, spec: Entry) -> Entry:
        """The run, from the file where it is there."""
        found = self.find(spec)
        if found is None:
            found = in_own_process(spec)
            self.add(found)
            print(json.dumps({name: value for name, value in found.items() if name != "ranks"}), flush=True)
        return found


def in_own_process(spec: Entry) -> Entry:
    """Run once; what the process prints last is its entry."""
    command = [sys.executable, str(Path(__file__).with_name("glue_run.py")), json.dumps(spec)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise SystemExit(f"a run failed: {spec}\n{done.stderr[-3000:]}")
    found: Entry = json.loads(done.stdout.splitlines()[-1])
    return found


def spec_of(split: str, method: str, task: str, rate: float, seed: int, options: argparse.Namespace) -> Entry:
    epochs = options.epochs * PASSES.get(task, 1) if split == "dev" else options.sweep_epochs
    run = {"split": split, "method": method, "task": task, "rate": rate, "seed": seed, "epochs": epochs}
    return run | {name: getattr(options, name) for name in ("batch", "precision", "threads")}


def neighbour(rate: float, up: bool) -> float:
    """The next rate in 1, 3, 10, 30 ... times a power of ten."""
    grid = [float(f"{digit}e{power}") for power in range(-8, 4) for digit in (1, 3)]
    return grid[min(range(len(grid)), key=lambda index: abs(math.log(grid[index] / rate))) + (1 if up else -1)]


def sweep(results: Results, method: str, options: argparse.Namespace) -> float:
    """Measure every rate on the sweep's tasks, and more at an end as long as the best is there; returns the best."""
    rates = sorted(RATES[method])
    while True:
        for rate in rates:
            for task in SWEEP_TASKS:
                results.get(spec_of("validation", method, task, rate, SWEEP_SEED, options))
        found = by_rate(results.entries, method)
        means = {rate: mean_score(found[rate], SWEEP_TASKS) for rate in rates}
        best = max(means, key=means.__getitem__)
        if best not in (rates[0], rates[-1]):
            return best
        rates = sorted([*rates, neighbour(best, up=best == rates[-1])])


def finals(method: str, rate: float, tasks: tuple[str, ...], options: argparse.Namespace) -> Iterator[Entry]:
    for seed in range(options.seeds):
        for task in tasks:
            yield spec_of("dev", method, task, rate, seed, options)


def compare(results: Results, options: argparse.Namespace) -> None:
    """The tasks of the sweep first, of all methods; then RTE, which takes longest."""
    rates = {}
    for method in options.methods:
        rates[method] = sweep(results, method, options)
        for spec in finals(method, rates[method], SWEEP_TASKS, options):
            results.get(spec)
    for method in options.methods:
        for spec in finals(method, rates[method], ("rte",), options):
            results.get(spec)


def estimate(results: Results, options: argparse.Namespace) -> str:
    """What is left to do at the least, from the step times so far; a sweep that is extended takes more."""
    entries, runs, steps, seconds = results.entries, 0, 0, 0.0
    for method in options.methods:
        trials = [(rate, task) for rate in RATES[method] for task in SWEEP_TASKS]
        wanted = [spec_of("validation", method, task, rate, SWEEP_SEED, options) for rate, task in trials]
        done = [one for one in entries if one["method"] == method]
        on_dev = {(one["task"], one["seed"]) for one in done if one["split"] == "dev"}
        left = [one for one in wanted if results.find(one) is None]
        left += [one for one in finals(method, 0.0, TASKS, options) if (one["task"], one["seed"]) not in on_dev]
        for spec in left:
            share = 0.9 if spec["split"] == "validation" else 1.0
            count = math.ceil(spec["epochs"] * share * TRAIN_ROWS[spec["task"]] / options.batch)
            timed = [one["seconds"]["training"] / one["steps"] for one in done if one["task"] == spec["task"]]
            steps += count
            seconds += RUN_SECONDS + (sum(timed) / len(timed) if timed else STEP_SECONDS[spec["task"]]) * count
            seconds += ALLOCATION_SECONDS if method == "alora" and not timed else 0
        runs += len(left)
    return f"at least {runs} runs are left, {steps} steps, about {seconds / 3600:.1f} hours"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file of results, made or continued")
    parser.add_argument("--table", action="store_true", help="print the tables of a file of results only")
    parser.add_argument("--estimate", action="store_true", help="print how long it would take only")
    parser.add_argument("--methods", nargs="+", choices=RATES, default=list(RATES), help="in this order (all)")
    parser.add_argument("--seeds", type=int, default=3, help="of the runs on dev (%(default)s)")
    parser.add_argument("--epochs", type=float, default=2.0, help="of the runs on dev (%(default)s)")
    parser.add_argument("--sweep-epochs", type=float, default=1.0, help="of the sweep (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="rows of a step (%(default)s)")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16", help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    results = Results(options.out)
    if not options.table:
        print(estimate(results, options), flush=True)
        if options.estimate:
            return
        results.open({name: getattr(options, name, PASSES) for name in KEPT} | {"machine": machine(options.threads)})
        compare(results, options)
    print(report(results.lines))


if __name__ == "__main__":
    main()
