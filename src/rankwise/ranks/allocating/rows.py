"""The rows that directions are scored on: a batch of evaluation at each event, in parts with little padding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor
from transformers import Trainer, TrainingArguments

from rankwise.tokenise import IGNORED


class Part(NamedTuple):
    """Some rows of an event.

    Attributes:
        batch: collated, on the device of the training.
        weight: what its mean loss counts for in that of the event: its tokens with a label, or its rows.
    """

    batch: Any
    weight: int


def rows_of_events(trainer: Trainer, events: int) -> list[list[Part]]:
    """The trainer's batches of evaluation, in order, ``events`` of them if there are as many.

    Each comes in parts of no more rows than a batch of training, those of like length together: a pass over them takes
    less time and memory than one over the whole batch, padded to its longest row. No row is dropped, and the trainer's
    own evaluations keep their dataloader.
    """
    arguments = trainer.args
    whole, size = arguments.eval_batch_size, arguments.per_device_eval_batch_size  # on all devices, and on each
    most = min(arguments.per_device_train_batch_size, size)
    part = max(number for number in range(1, most + 1) if size % number == 0)
    rows = list(islice(trainer.eval_dataset, events * whole))
    ordered = [row for at in range(0, len(rows), whole) for row in sorted(rows[at : at + whole], key=_length)]
    changes = {"dataloader_persistent_workers": False, "dataloader_drop_last": False}  # a kept dataloader is used again
    with _changed(arguments, per_device_eval_batch_size=part, **changes):
        # At once: a dataloader that is left half read makes accelerate believe that it is the one of the training.
        parts = [Part(batch, _weight(batch)) for batch in trainer.get_eval_dataloader(ordered)]
    return [_counted(parts[at : at + size // part]) for at in range(0, len(parts), size // part)]


def _length(row: Any) -> int:
    return len(row["input_ids"]) if isinstance(row, Mapping) and "input_ids" in row else 0


def _weight(batch: Mapping[str, Any]) -> int:
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.ndim > 1 and not labels.is_floating_point():
        return int((labels != IGNORED).sum())
    return len(next(iter(batch.values())))


def _counted(parts: list[Part]) -> list[Part]:
    """Those that have a loss; all of them, whose loss is refused later, if none has."""
    return [part for part in parts if part.weight] or parts


@contextmanager
def _changed(arguments: TrainingArguments, **changes: Any) -> Iterator[None]:
    """The arguments with other values meanwhile."""
    before = {name: getattr(arguments, name) for name in changes}
    vars(arguments).update(changes)
    try:
        yield
    finally:
        vars(arguments).update(before)
