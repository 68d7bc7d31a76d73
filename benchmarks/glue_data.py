"""Three tasks of GLUE: their rows, as tokens, and their scores."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rankwise.tasks.glue import TASKS, read_glue
from rankwise.tasks.label_scores import label_scores
from rankwise.tasks.splits import hold_out

Rows = list[dict[str, Any]]
Scores = dict[str, float]
CONTEXT = 128
SWEEP_SEED = 100

# RTE and MRPC have two classes; the head of STS-B has one output, the score from 0 to 5.
CLASSES = {"rte": 2, "mrpc": 2, "stsb": 1}


def read(task: str, dev: bool) -> Rows:
    """Rows of sentence1, sentence2 and label of a task's train or dev file."""
    folder = Path(os.environ.get("RANKWISE_DATA", "../shared/data")) / "glue"
    return read_glue(task, "dev" if dev else "train", folder)[0]


@functools.cache
def splits(task: str) -> dict[str, Rows]:
    """Train and dev as GLUE has them; ``rest`` and ``validation`` are train without and with a held-out tenth."""
    train = read(task, dev=False)
    rest, validation = hold_out(train, 0.1, SWEEP_SEED)
    sample = hold_out(train, 500, 0)[1]
    return {"train": train, "dev": read(task, dev=True), "rest": rest, "validation": validation, "sample": sample}


def encode(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """Tokens of each pair of sentences, the longer one cut where both have more than CONTEXT."""
    pairs = [row["sentence1"] for row in rows], [row["sentence2"] for row in rows]
    tokens = tokenizer(*pairs, truncation="longest_first", max_length=CONTEXT, return_attention_mask=False)
    columns = zip(tokens["input_ids"], tokens["token_type_ids"], rows, strict=True)
    return [{"input_ids": ids, "token_type_ids": types, "labels": row["label"]} for ids, types, row in columns]


def scores(task: str, outputs: np.ndarray, labels: np.ndarray) -> Scores:
    """GLUE's measures of a task; a correlation with outputs that are all the same is 0.

    Args:
        task: one of CLASSES.
        outputs: of the head, (rows, classes).
        labels: (rows,).
    """
    return {name.lower(): value for name, value in label_scores(TASKS[task].metrics, outputs, labels).items()}
