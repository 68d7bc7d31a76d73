"""A step of a recipe's sft stage against bare ``transformers.Trainer``, with the same PEFT adapter, rows and settings.

The shipped model learns text, so that every token is a label and both compute the same. What is timed is the trainers'
own ``train_runtime`` over all steps, in turns; rankwise's has its callbacks, its log and its loss, and is timed with
the recipe's ``deterministic`` too.
``--clock processor`` takes the processor's time of making and running the trainer instead, which other work on the
machine stretches less.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from rich.console import Console
from transformers import Trainer, TrainingArguments

from rankwise.methods import with_adapter
from rankwise.models import load_language_model, load_tokenizer, quiet_libraries
from rankwise.recipes import make_recipe
from rankwise.run import deterministic
from rankwise.schema import ModelSettings
from rankwise.tokenise import AnswerCollator
from rankwise.training import train_stage
from timing import interleaved, machine, ratio, spread

WAYS = ("transformers.Trainer", "rankwise", "rankwise, deterministic")


def rows(count: int, length: int, vocabulary: int) -> list[dict[str, Any]]:
    """Random tokens; all but the first are labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocabulary, (count, length), generator=generator).tolist()
    return [{"input_ids": row, "labels": [-100, *row[1:]]} for row in ids]


def model_of(kind: str) -> peft.PeftModel:
    """The shipped model with a new adapter."""
    rest = {"data": {"kind": "text", "train": "-"}, "stages": [{"kind": "sft"}], "output": "-"}
    torch.manual_seed(0)
    return with_adapter(load_language_model(ModelSettings()), make_recipe({"adapter": kind, **rest}), "CAUSAL_LM")


def processor_time(work: Callable[[], float]) -> float:
    """Seconds of all threads of this process."""
    started = time.process_time()
    work()
    return time.process_time() - started


def bare(model: peft.PeftModel, data: list[dict[str, Any]], batch: int) -> float:
    """Seconds of the bare trainer, with the model's own loss."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch,
            learning_rate=5e-4,
            max_grad_norm=1.0,
            bf16=False,
            num_train_epochs=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            logging_steps=max(1, len(data) // batch // 50),
            remove_unused_columns=False,
        )
        collator = AnswerCollator.of(load_tokenizer("embedded"))
        trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator)
        return float(trainer.train().metrics["train_runtime"])


def ours(model: peft.PeftModel, kind: str, data: list[dict[str, Any]], batch: int) -> float:
    """Seconds of a stage."""
    rest = {"data": {"kind": "text", "train": "-"}, "output": "-", "adapter": kind}
    recipe = make_recipe({**rest, "stages": [{"kind": "sft", "batch_size": batch, "learning_rate": 5e-4}]})
    with tempfile.TemporaryDirectory() as folder:
        train_stage(
            model,
            load_tokenizer("embedded"),
            recipe.stages[0],
            data,
            adapter=recipe.adapter,
            context=512,
            folder=Path(folder),
            seed=0,
            bfloat16=False,
            console=Console(file=io.StringIO()),
        )
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return float(lines[-1]["train_runtime"])


def add_sizes(parser: argparse.ArgumentParser, steps: int, length: int) -> None:
    """Arguments for the size of a stage and of the measurement."""
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=length)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)


def main() -> None:
    """Print a line for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["lora", "dora"])
    add_sizes(parser, steps=30, length=128)
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    options = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(options.threads)
    print(machine(options.threads))
    vocabulary = load_language_model(ModelSettings()).config.vocab_size
    data = rows(options.steps * options.batch, options.length, vocabulary)
    for kind in options.methods:

        def measured(way: str, kind: str = kind) -> float:
            model = model_of(kind)
            work = partial(*((bare, model) if way == WAYS[0] else (ours, model, kind)), data, options.batch)
            with deterministic(way == WAYS[2]):
                return (work() if options.clock == "wall" else processor_time(work)) / options.steps

        measures = {way: partial(measured, way) for way in WAYS}
        found = interleaved(measures, options.runs)
        for way in WAYS:
            milliseconds = [1000 * value for value in found[way]]
            print(f"{kind}, {way}: {spread(milliseconds, 'ms a step', 1)}")
        for one, other in itertools.pairwise(reversed(WAYS)):
            print(f"{kind}: {one} over {other} {ratio(found[one], found[other])}")


if __name__ == "__main__":
    main()
