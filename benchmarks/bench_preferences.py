"""A training step of softmax-DPO as published and in one pass over the prompt; and whole trainings against TRL's DPO.

Steps: forward, loss, backward and AdamW on LoRA of rank 8, all linear layers of a Llama with random weights.
*published* is (1 + K) whole sequences with all their logits and the reference at each step, *separate* ours without
prefix trees, *tree* ours, and *reference known* with the reference's log-probabilities from before. *Fewer tokens* is
the published batch's size over the way's, padding included. It is the limit of the speed-up in a large model: one and a
half times it with the reference known, a pass less of three. Where the head is much of the model the limit is passed,
as the head runs on answers only. Tokens a second are those of the whole sequences, padding aside. Loss and gradient are
those of a first step, and so is the memory, what the step adds: each way in a process of its own.

Trainings: the time of ``train()``, with the reference as the trainers compute it by default (TRL at each step, ours
once before the first) and without it (known before). On a CPU, TRL's head runs on all tokens, and on those of answers
where there is Triton: the shape with a small head tells how much of the difference is due to that.

    python benchmarks/bench_preferences.py
    python benchmarks/bench_preferences.py --shapes 1b --rows 4 --device cuda --dtype bfloat16 --trainings

The second, with FlexAttention beside SDPA, is for a GPU; it has not been run yet.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, PrinterCallback

import rankwise as rw
from bench_ranking import prompt
from preference_ways import ON_A_GPU, PUBLISHED, SHAPES, WAYS, Case, First, Steps, Way, first_step, lora
from rankwise.models import load_tokenizer, quiet_libraries
from rankwise.recommend.synthetic import SyntheticSettings, synthetic_log
from rankwise.tokenise import token_ids
from timing import interleaved, machine, ratio, seconds, spread, table

TRL, OURS, SEED = "TRL", "rankwise", 5


def first_step_elsewhere(case: Case, way: Way) -> First:
    """In a new process, which a server forks that has imported the libraries."""
    # What is freed goes back to the system at once: memory is what is in use, not what lies about.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["peft", "transformers.models.llama.modeling_llama", "rankwise.preferences.batches"])
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(first_step, case, way).result()


def compare_steps(case: Case, runs: int) -> list[list[str]]:
    """Rows of the table for one case."""
    on_a_gpu = case.device == "cuda"
    ways = WAYS | (ON_A_GPU if on_a_gpu else {})
    first = {name: first_step_elsewhere(case, way) for name, way in ways.items()}
    steps = Steps(case)
    ready = {name: steps.ready(way) for name, way in ways.items()}
    found = interleaved({name: partial(seconds, step) for name, step in ready.items()}, runs, warm_up=on_a_gpu)
    tokens = {name: way.tokens(steps.rows) for name, way in ways.items()}
    whole = sum(len(row.prompt) + len(answer) for row in steps.rows for answer in row.answers)
    published = first[PUBLISHED]
    size = np.linalg.norm(published.gradient)
    return [
        [
            f"{case.shape} (head {100 * steps.head_share:.0f} %)",
            str(case.negatives),
            name,
            spread(found[name]),
            ratio(found[PUBLISHED], found[name]),
            f"{tokens[PUBLISHED] / tokens[name]:.2f}",
            f"{whole / statistics.median(found[name]):.0f}",
            f"{own.memory:.0f} MiB",
            f"1/{published.memory / own.memory:.1f}",
            f"{abs(own.loss / published.loss - 1):.1e}",
            f"{np.linalg.norm(own.gradient - published.gradient) / size:.1e}",
        ]
        for name, own in first.items()
    ]


def film_rows(tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> list[dict[str, str]]:
    """Prompts of about ``length`` tokens of made-up titles, a chosen and a rejected title."""
    generator = random.Random(0)
    titles: list[str] = synthetic_log(SyntheticSettings(users=1, series=12, singles=30))[1]["title"].to_list()
    rows = []
    for _ in range(count):
        shuffled = generator.sample(titles, len(titles))
        seen = [shuffled.pop()]
        while len(token_ids(tokenizer, [prompt(seen)])[0]) < length:
            seen.append(shuffled.pop())
        rows.append({"prompt": prompt(seen), "chosen": f" {shuffled[0]}", "rejected": f" {shuffled[1]}"})
    return rows


class Trainings:
    """Whole trainings on the same rows from the same start, by TRL and by us.

    Attributes:
        losses: of the steps of each training's last run.
        before: seconds until ``train()``, of each run: tokenising, and the reference where it is to be known.
    """

    def __init__(self, arguments: argparse.Namespace, shape: str, folder: str) -> None:
        self.arguments, self.shape, self.folder = arguments, shape, folder
        self.tokenizer = load_tokenizer("embedded")
        self.rows = film_rows(self.tokenizer, arguments.steps * arguments.batch, arguments.prompt)
        self.losses: dict[str, list[float]] = {}
        self.before: dict[str, list[float]] = {}

    def measures(self) -> dict[str, Callable[[], float]]:
        return {
            name + ending: partial(self.measure, name + ending, make, known)
            for known, ending in ((False, ""), (True, ", reference known"))
            for name, make in ((TRL, self.theirs), (OURS, self.ours))
        }

    def measure(self, name: str, make: Callable[[bool], Any], known: bool) -> float:
        """Seconds of ``train()``."""
        made: list[Any] = []
        self.before.setdefault(name, []).append(seconds(lambda: made.append(make(known))))
        made[0].remove_callback(PrinterCallback)
        taken = seconds(made[0].train)
        self.losses[name] = [line["loss"] for line in made[0].state.log_history if "loss" in line]
        return taken

    def theirs(self, known: bool) -> Any:
        import trl
        from datasets import Dataset

        begin = self.tokenizer.bos_token or ""
        begun = Dataset.from_list([row | {"prompt": begin + row["prompt"]} for row in self.rows])
        settings = self.settings() | {"precompute_ref_log_probs": known, "gradient_checkpointing": False}
        return trl.DPOTrainer(args=trl.DPOConfig(**settings), train_dataset=begun, **self.start())

    def ours(self, known: bool) -> rw.SoftmaxDPOTrainer:
        made = rw.SoftmaxDPOTrainer(
            args=rw.SoftmaxDPOConfig(**self.settings()), train_dataset=self.rows, **self.start()
        )
        if known:
            made.compute_reference()
        return made

    def start(self) -> dict[str, Any]:
        """A new model each time."""
        base = SHAPES[self.shape].base(self.arguments.device, self.arguments.dtype)
        torch.manual_seed(SEED)  # from which TRL draws the adapter
        return {"model": base, "peft_config": lora(), "processing_class": self.tokenizer}

    def settings(self) -> dict[str, Any]:
        return {
            "output_dir": self.folder,
            "per_device_train_batch_size": self.arguments.batch,
            "num_train_epochs": 1,
            "learning_rate": 2e-4,
            "beta": 1.0,
            "seed": SEED,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": self.arguments.device == "cpu",
            "bf16": False,  # a model in bfloat16 is trained in it, whole
        }


def compare_trainings(arguments: argparse.Namespace, shape: str) -> list[list[str]]:
    """Rows of the table for one shape."""
    with tempfile.TemporaryDirectory() as folder:
        trainings = Trainings(arguments, shape, folder)
        found = interleaved(trainings.measures(), arguments.runs, warm_up=False)
    rows = []
    for name, taken in found.items():
        theirs = name.replace(OURS, TRL)
        gaps = [abs(a - b) for a, b in zip(trainings.losses[name], trainings.losses[theirs], strict=True)]
        before = statistics.median(trainings.before[name])
        ends = f"{trainings.losses[name][0]:.4f} to {trainings.losses[name][-1]:.4f}"
        rows.append(
            [shape, name, spread(taken), ratio(found[theirs], taken), f"{before:.2f} s", ends, f"{max(gaps):.1e}"]
        )
    return rows


def main() -> None:
    """Print two tables of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="of each way (%(default)s)")
    parser.add_argument(
        "--shapes", nargs="*", choices=SHAPES, default=["15m", "wide"], help="of steps; none is possible (%(default)s)"
    )
    parser.add_argument("--negatives", type=int, nargs="+", default=[3, 15], help="K (%(default)s)")
    parser.add_argument("--prompt", type=int, default=300, help="tokens of a prompt (%(default)s)")
    parser.add_argument("--rows", type=int, default=2, help="of a step (%(default)s)")
    parser.add_argument(
        "--trainings",
        nargs="*",
        choices=SHAPES,
        default=["15m", "7m"],
        help="their shapes; none is possible (%(default)s)",
    )
    parser.add_argument("--steps", type=int, default=4, help="of a training (%(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="rows of a training's step (%(default)s)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="(%(default)s)")
    parser.add_argument("--dtype", default="float32", help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (%(default)s)")
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(arguments.threads)
    print(machine(arguments.threads) if arguments.device == "cpu" else torch.cuda.get_device_name())
    print(f"{arguments.dtype}; prompts of {arguments.prompt} tokens; {arguments.runs} runs of each, in turns: median")
    print("(least to most)\n")
    where = (arguments.prompt, arguments.device, arguments.dtype, arguments.threads)
    cases = [Case(shape, arguments.rows, k, *where) for shape in arguments.shapes for k in arguments.negatives]
    rows = [row for case in cases for row in compare_steps(case, arguments.runs)]
    head = ["shape", "K", "way", "seconds", "times as fast", "fewer tokens", "tokens/s", "memory added"]
    if rows:
        print(table([*head, "of published", "loss differs by", "gradient by"], rows))
    rows = [row for shape in arguments.trainings for row in compare_trainings(arguments, shape)]
    if rows:
        print(f"\n{arguments.steps} steps of {arguments.batch} rows with one negative\n")
        print(table(["shape", "trainer", "train()", "times as fast", "before", "loss", "differs by, at most"], rows))


if __name__ == "__main__":
    main()
