"""What a run needs of its data, whatever its kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import polars as pl
from torch import nn
from transformers import PreTrainedModel

from rankwise.checkpoints import CheckpointedTrainer
from rankwise.preferences.negatives import Catalogue
from rankwise.recommend.store import Store

Metrics = dict[str, float]


class Measurement(NamedTuple):
    """Metrics of a model, one for each column that it has; and the cases that some are means of, a row each."""

    metrics: Metrics
    cases: pl.DataFrame | None = None


@runtime_checkable
class Task(Protocol):
    """Data made ready for training, with a way to measure a model on it.

    Attributes:
        kind: shown in the results: recommend, preferences, instructions, maths, choices, text or classification.
        columns: names of the metrics, in the order of the table.
        cases: how many cases a measurement is over.
        counts: what was read, dropped, cut or left out.
        task_type: PEFT's name for the kind of model.
        labels: names of the labels, in classification; none otherwise.
        trainer: makes the trainer of an sft stage; the answer trainer where it is None.
        store: what the finished model needs of the data to recommend; None where it does something else.
    """

    kind: str
    columns: tuple[str, ...]
    cases: int
    counts: dict[str, int]
    task_type: str
    labels: list[str]
    trainer: Callable[..., CheckpointedTrainer] | None
    store: Store | None

    def load_model(self) -> PreTrainedModel:
        """The base model, of the kind that the task needs."""

    def sft_rows(self) -> Sequence[Mapping[str, Any]]:
        """Encoded rows for supervised training."""

    def preference_rows(self, limit: int | None) -> tuple[Sequence[Mapping[str, Any]], Catalogue | None]:
        """Rows of prompt, chosen and rejected, at most ``limit``, and all answers to draw rejected ones from, if known.

        A row's ``candidates`` may be drawn too, and what is in its ``seen`` never.
        """

    def baselines(self) -> dict[str, Callable[[], Measurement]]:
        """What needs no language model, by name: each is computed where it is called."""

    def evaluate(self, model: nn.Module) -> Measurement:
        """Measure a model; leaves its mode as it was."""

    def evaluate_training(self, model: nn.Module, limit: int, seed: int) -> Metrics:
        """The same metrics over at most ``limit`` of the training rows, drawn by ``seed``."""
