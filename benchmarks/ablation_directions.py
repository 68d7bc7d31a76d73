"""Which directions should an adapter start from? LoRA against minor, principal, middle and random directions.

The embedded model, which has read film reviews, learns to answer instructions. Measured are the loss on answers that it
was not trained on (target) and how much worse it then is at film reviews that it never read (forgetting), in nats a
token. Each method gets its own learning rate from a sweep with one more seed, by the loss on validation rows: the
sweep is extended until the best rate has a worse one on either side, then made finer about it. Several seeds at that
rate are measured on test rows.

    RANKWISE_DATA=../shared/data python benchmarks/ablation_directions.py --out runs/ablation.jsonl
    python benchmarks/ablation_directions.py --out runs/ablation.jsonl --table

Results are written as they come, and the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import polars as pl
import torch
from peft import PeftModel
from rich.console import Console
from transformers import set_seed

from rankwise.errors import UserError
from rankwise.files import write_jsonl
from rankwise.methods import adapter_config
from rankwise.models import load_language_model, load_tokenizer, quiet_libraries
from rankwise.schema import LoraSettings, MiloraSettings, ModelSettings, SftStage
from rankwise.tasks.instructions import read_instructions
from rankwise.tasks.language_loss import answer_loss
from rankwise.tasks.splits import hold_out
from rankwise.tasks.text import as_features, pack
from rankwise.tokenise import encode_answers
from rankwise.training import train_stage
from timing import machine, table

Rows = list[dict[str, list[int]]]
Entry = dict[str, Any]
Points = dict[float, Entry]
METHODS = ("lora", "minor", "principal", "middle", "random")
TASKS: dict[str, tuple[str, dict[str, str] | None]] = {
    "alpaca": ("instruct/alpaca_subset.json", None),
    "gsm8k": ("gsm8k/train.jsonl", {"prompt": "question", "completion": "answer"}),
}
# The first reviews of the files that the embedded model was never trained on: scripts/pretrain_tiny.py.
HELD_OUT_REVIEWS = ("imdb-test-pos", "imdb-test-neg")
SWEEP_SEED = 100
REVIEW_TOKENS = 1024
BASE = "base"


@functools.cache
def data_folder() -> Path:
    return Path(os.environ.get("RANKWISE_DATA", "../shared/data"))


@functools.cache
def target_rows(name: str, sizes: tuple[int, int, int], context: int) -> dict[str, Rows]:
    """Rows to train, to choose rates by, and to report: the same for every seed."""
    file, mapping = TASKS[name]
    tokenizer = load_tokenizer("embedded")
    read = read_instructions(data_folder() / file, mapping=mapping).rows
    rows, dropped = encode_answers(read, tokenizer, context)
    print(f"{name}: {len(rows)} rows within {context} tokens; {dropped or 'none'} left out or cut", flush=True)
    rest, test = hold_out(rows, sizes[2], seed=0)
    rest, validation = hold_out(rest, sizes[1], seed=1)
    train = hold_out(rest, sizes[0], seed=2)[1] if sizes[0] < len(rest) else rest
    return {"train": train, "validation": validation, "test": test}


@functools.cache
def review_rows(each: int) -> Rows:
    """Packed rows of the first ``each`` reviews of each held-out file, with line breaks for their HTML."""
    texts: list[str] = []
    for name in HELD_OUT_REVIEWS:
        column = pl.read_parquet(data_folder() / "text" / f"{name}.parquet", columns=["text"])["text"].head(each)
        texts += column.str.replace_all("<br />", "\n", literal=True).str.replace_all(r"\n{3,}", "\n\n").to_list()
    return as_features(pack(texts, load_tokenizer("embedded"), REVIEW_TOKENS))


def new_model(method: str, rank: int, seed: int) -> PeftModel:
    """The embedded model with an adapter on every linear layer; each method has its habitual alpha."""
    settings = LoraSettings(r=rank) if method == "lora" else MiloraSettings(r=rank, part=method)
    set_seed(seed)
    return peft.get_peft_model(load_language_model(ModelSettings()), adapter_config(settings, "CAUSAL_LM", seed))


def train(model: PeftModel, rows: Rows, rate: float, seed: int, options: argparse.Namespace) -> None:
    stage = SftStage(
        kind="sft",
        name="sft",
        learning_rate=rate,
        batch_size=options.batch,
        epochs=options.epochs,
        warmup=options.warmup,
        schedule="linear",
        weight_decay=0.0,
    )
    with tempfile.TemporaryDirectory() as folder:
        train_stage(
            model,
            load_tokenizer("embedded"),
            stage,
            rows,
            adapter=None,
            context=options.context,
            folder=Path(folder),
            seed=seed,
            bfloat16=options.precision == "bfloat16",
            console=Console(quiet=True),
        )


def measure(model: torch.nn.Module, split: str, options: argparse.Namespace) -> Entry:
    """Loss on the answers of a split and on held-out reviews, in nats a token."""
    target = target_rows(options.task, tuple(options.rows), options.context)[split]
    low = options.precision == "bfloat16"
    with torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=low):
        return {
            "target": answer_loss(model, target)["loss"],
            "reviews": answer_loss(model, review_rows(options.reviews))["loss"],
        }


def run(split: str, method: str, rate: float, seed: int, options: argparse.Namespace) -> Entry:
    """Train once and measure; a training that broke down has a target and a review loss of None."""
    rows = target_rows(options.task, tuple(options.rows), options.context)["train"]
    started = time.perf_counter()
    model = new_model(method, options.rank, seed)
    try:
        train(model, rows, rate, seed, options)
        trained = time.perf_counter()
        found = measure(model, split, options)
    except UserError as error:
        trained, found = time.perf_counter(), {"target": None, "reviews": None, "error": str(error)}
    seconds = {"training": round(trained - started, 1), "measuring": round(time.perf_counter() - trained, 1)}
    return {"split": split, "method": method, "rate": rate, "seed": seed, **found, "seconds": seconds}


class Results:
    """Finished runs, a JSON line each after a first one with the settings; a finished run is not run again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.entries: list[Entry] = [json.loads(line) for line in lines]

    def open(self, settings: Entry) -> None:
        """Write the settings of a new file; those of an old one must be the same."""
        if not self.entries:
            self.add(settings)
        elif self.entries[0] != json.loads(json.dumps(settings)):
            raise SystemExit(f"{self.path} holds runs with other settings ({self.entries[0]}): give another --out")

    def add(self, entry: Entry) -> None:
        self.entries.append(entry)
        write_jsonl(self.path, self.entries)

    def of(self, split: str, method: str) -> list[Entry]:
        return [entry for entry in self.entries[1:] if (entry["split"], entry["method"]) == (split, method)]

    def get(self, split: str, method: str, rate: float, seed: int, options: argparse.Namespace) -> Entry:
        """The run, from the file where it is there."""
        for entry in self.of(split, method):
            if (entry["rate"], entry["seed"]) == (rate, seed):
                return entry
        self.add(run(split, method, rate, seed, options))
        print(json.dumps(self.entries[-1]), flush=True)
        return self.entries[-1]

    def points(self, method: str) -> Points:
        """The sweep of a method by rate, ascending."""
        return {entry["rate"]: entry for entry in sorted(self.of("validation", method), key=lambda one: one["rate"])}


def loss(entry: Mapping[str, Any]) -> float:
    """Target loss, infinite where the training broke down."""
    return math.inf if entry["target"] is None else float(entry["target"])


def best(points: Points) -> float:
    return min(points, key=lambda rate: loss(points[rate]))


def neighbour(rate: float, up: bool) -> float:
    """The next rate in 1, 3, 10, 30 ... times a power of ten."""
    grid = [float(f"{digit}e{power}") for power in range(-8, 4) for digit in (1, 3)]
    return grid[min(range(len(grid)), key=lambda index: abs(math.log(grid[index] / rate))) + (1 if up else -1)]


def sweep(results: Results, method: str, options: argparse.Namespace) -> float:
    """Measure every rate, more at an end as long as the best is there, then one on either side; returns the best."""
    rates, points = sorted(options.rates), Points()
    while not points or best(points) in (rates[0], rates[-1]):
        if points:
            rates = sorted([*rates, neighbour(best(points), up=best(points) == rates[-1])])
        points = measured(results, method, rates, options)
    place = rates.index(best(points))
    between = [float(f"{math.sqrt(low * high):.1e}") for low, high in itertools.pairwise(rates[place - 1 : place + 2])]
    return best(points | measured(results, method, between, options))


def measured(results: Results, method: str, rates: Sequence[float], options: argparse.Namespace) -> Points:
    """The sweep's run at each rate."""
    return {rate: results.get("validation", method, rate, SWEEP_SEED, options) for rate in rates}


def ablate(results: Results, options: argparse.Namespace) -> None:
    for split in ("validation", "test"):
        if not results.of(split, BASE):
            found = measure(load_language_model(ModelSettings()), split, options)
            results.add({"split": split, "method": BASE, "rate": 0.0, "seed": 0, **found})
    rates = {method: sweep(results, method, options) for method in METHODS}
    for seed in range(options.seeds):
        for method in METHODS:
            results.get("test", method, rates[method], seed, options)


def forgotten(results: Results, entry: Entry) -> float:
    """Review loss after training less that of the base."""
    return float(entry["reviews"] - results.of(entry["split"], BASE)[0]["reviews"])


def spread(values: Sequence[float], sign: str = "") -> str:
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.4f}{deviation}"


def cell(results: Results, entry: Entry | None, digits: int = 3) -> str:
    """A run's target loss with its forgetting."""
    if entry is None:
        return "-"
    if entry["target"] is None:
        return "broke down"
    return f"{entry['target']:.{digits}f} ({forgotten(results, entry):+.{digits}f})"


def sweep_table(results: Results) -> str:
    """Validation loss and forgetting at each rate; the best rate of each method in bold."""
    sweeps = {method: results.points(method) for method in METHODS}
    rates = sorted({rate for points in sweeps.values() for rate in points})
    rows = []
    for rate in rates:
        texts = [(cell(results, points.get(rate)), bool(points) and rate == best(points)) for points in sweeps.values()]
        rows.append([f"{rate:g}", *(f"**{text}**" if chosen else text for text, chosen in texts)])
    return table(["rate", *METHODS], rows)


def test_table(results: Results) -> str:
    """Mean and standard deviation over seeds, and the difference from LoRA seed by seed."""
    reference = {entry["seed"]: loss(entry) for entry in results.of("test", "lora")}
    rows = []
    for method in METHODS:
        entries = [entry for entry in results.of("test", method) if entry["target"] is not None]
        if not entries:
            continue
        differences = [loss(entry) - reference.get(entry["seed"], math.inf) for entry in entries]
        differences = [difference for difference in differences if math.isfinite(difference)]
        against = spread(differences, "+") if differences and method != "lora" else "-"
        rate = ", ".join(f"{rate:g}" for rate in sorted({entry["rate"] for entry in entries}))
        target, gone = spread([*map(loss, entries)]), spread([forgotten(results, entry) for entry in entries], "+")
        rows.append([method, rate, str(len(entries)), target, against, gone])
    return table(["", "rate", "seeds", "target loss", "target loss minus LoRA's", "forgetting"], rows)


def seed_table(results: Results) -> str:
    """Target loss and forgetting of every test run."""
    found = {(entry["seed"], method): entry for method in METHODS for entry in results.of("test", method)}
    seeds = sorted({seed for seed, _ in found})
    rows = [[str(seed), *(cell(results, found.get((seed, method)), 4) for method in METHODS)] for seed in seeds]
    return table(["seed", *METHODS], rows)


def matched_forgetting(results: Results, method: str, level: float) -> float | None:
    """Forgetting where the sweep first reaches a target loss, between the rates on either side of it."""
    points = results.points(method)
    rising = [points[rate] for rate in points if rate <= best(points)]
    for before, after in itertools.pairwise(rising):
        if loss(before) >= level >= loss(after):
            share = (loss(before) - level) / (loss(before) - loss(after))
            first, second = forgotten(results, before), forgotten(results, after)
            return first + share * (second - first)
    return None


def matched_table(results: Results) -> str:
    """Forgetting at equal target loss: at the worst of the methods' best losses, and at two before it."""
    worst = max(min(map(loss, results.points(method).values())) for method in METHODS)
    levels = [worst + extra for extra in (0.0, 0.05, 0.1)]
    rows = []
    for method in METHODS:
        found = [matched_forgetting(results, method, level) for level in levels]
        rows.append([method, *("-" if value is None else f"{value:+.4f}" for value in found)])
    return table(["", *(f"at {level:.3f}" for level in levels)], rows)


def report(results: Results) -> None:
    """Print what there is so far."""
    print(", ".join(f"{name} {value}" for name, value in results.entries[0].items()), "\n")
    for split in ("validation", "test"):
        base = results.of(split, BASE)[0]
        print(f"base, {split}: target loss {base['target']:.4f}, reviews {base['reviews']:.4f}")
    print(f"\nsweep, seed {SWEEP_SEED}: validation loss (forgetting)\n\n{sweep_table(results)}")
    if all(results.points(method) for method in METHODS):
        print(f"\nforgetting at equal validation loss, between rates of the sweep\n\n{matched_table(results)}")
    print(f"\ntest\n\n{test_table(results)}\n\ntarget loss (forgetting) by seed\n\n{seed_table(results)}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file of results, made or continued")
    parser.add_argument("--table", action="store_true", help="print the tables of a file of results only")
    parser.add_argument("--task", choices=TASKS, default="alpaca", help="what is learnt (%(default)s)")
    parser.add_argument(
        "--rows", type=int, nargs=3, default=[560, 200, 300], help="to train, validate and test (%(default)s)"
    )
    parser.add_argument("--reviews", type=int, default=60, help="of each held-out file (%(default)s)")
    parser.add_argument("--context", type=int, default=512, help="most tokens of a row (%(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="rows of a step (%(default)s)")
    parser.add_argument("--epochs", type=float, default=1.0, help="(%(default)s)")
    parser.add_argument("--warmup", type=float, default=0.1, help="share of the steps (%(default)s)")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3, 1e-2], help="(%(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="of the test runs (%(default)s)")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16", help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    results = Results(options.out)
    if not options.table:
        torch.set_num_threads(options.threads)
        quiet_libraries()
        kept = ("task", "rows", "reviews", "context", "rank", "batch", "epochs", "warmup", "precision")
        results.open({name: getattr(options, name) for name in kept} | {"machine": machine(options.threads)})
        ablate(results, options)
    report(results)


if __name__ == "__main__":
    main()
