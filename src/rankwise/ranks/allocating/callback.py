"""Allocating LoRA under transformers' Trainer."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.errors import UserError
from rankwise.files import write_json
from rankwise.peft_bridge import active_adapter, adapted_layers
from rankwise.ranks.allocating.allocation import (
    allocation_steps,
    check_adapter,
    check_count,
    check_schedule,
    choose,
    importance,
)
from rankwise.ranks.allocating.rows import Part, rows_of_events
from rankwise.ranks.resizing import check_one_process, resize_adapter
from rankwise.reading import first_line, read_json

logger = logging.getLogger(__name__)
EVENTS = "allocation_events.json"  # in a checkpoint
AGAIN = "resume from another checkpoint"


@dataclass(frozen=True)
class AllocationEvent:
    """Directions that were moved at once.

    Attributes:
        step: optimizer steps before it.
        moved: how many directions were cut, and as many added.
        ranks_before: rank of each layer, by its name in the base model.
        ranks: the same afterwards; 0 where the layer's adapter was removed.
        lowest: the lowest score of a direction (see :func:`rankwise.ranks.importance`).
        highest: the highest.
        highest_cut: the highest among those that were cut.
        seconds: for scoring, cutting and adding.
    """

    step: int
    moved: int
    ranks_before: dict[str, int]
    ranks: dict[str, int]
    lowest: float
    highest: float
    highest_cut: float
    seconds: float

    @property
    def removed(self) -> tuple[str, ...]:
        """Layers whose adapter was removed."""
        return tuple(name for name, rank in self.ranks.items() if not rank)


class AllocationCallback(TrainerCallback):
    """Moves directions between the layers of a LoRA adapter while a ``transformers.Trainer`` trains it.

    At ``events`` steps of the training each direction is scored on a batch of the trainer's ``eval_dataset``, rows that
    are not trained on, by the trainer's own loss, a mean over rows or over tokens with a label. The lowest are cut, as
    many new ones go to layers that lose none (see ``choose``), and the optimizer goes on. The adapter is plain LoRA
    throughout. Scoring costs two forward passes a direction, in parts of no more rows than a batch of training. ::

        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=held_out)
        trainer.add_callback(AllocationCallback(trainer, events=4))

    A training that resumes from a checkpoint needs the ranks of the checkpoint: call
    :func:`rankwise.ranks.match_ranks` before ``trainer.train(resume_from_checkpoint=...)``.

    Args:
        trainer: that trains; its batches of evaluation are taken in turn, one for each event.
        events: how many times directions are moved, 1 or more.
        share: of all directions, moved each time; above 0 and below 1, one direction at least.
        first: share of the training that is without changes, 0 or more.
        last: share of the training after which nothing changes any more, below 1.

    Attributes:
        history: the events of this training, in order.

    Raises:
        UserError: a value out of its range, or a trainer without rows to score on. When training begins: the adapter is
            not plain LoRA (see ``check_adapter``), the training has several processes or
            fewer steps than events, or fewer directions than would be moved. While training: the optimizer keeps a
            state that cannot be cut, or a score is not finite.

    Source: Allocating LoRA (arXiv 2403.16187). Its schedule counts epochs before and between events; shares of the
        training, and the defaults, are our choice.
    """

    def __init__(
        self, trainer: Trainer, *, events: int = 5, share: float = 0.1, first: float = 0.2, last: float = 0.7
    ) -> None:
        check_schedule(events, first, last)
        if not 0 < share < 1:
            raise UserError(f"share {share} is not possible: it must be above 0 and below 1")
        if not trainer.eval_dataset or isinstance(trainer.eval_dataset, dict):
            raise UserError("directions are scored on rows that are not trained on: give the trainer one eval_dataset")
        self.trainer = trainer
        self.events, self.share, self.first, self.last = events, share, first, last
        self.history: list[AllocationEvent] = []
        self.steps: tuple[int, ...] = ()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Trainer's hook: check everything, and collate the batches."""
        check_one_process("allocating LoRA")
        adapter = check_adapter(model)
        check_count(self._count(model, adapter), _total(model, adapter))
        self.steps = allocation_steps(state.max_steps, self.events, self.first, self.last)
        if not state.global_step:
            self.history = []
        self.rows = rows_of_events(self.trainer, self.events)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Trainer's hook: move directions where it is time to; gradients are gone by then."""
        if state.global_step in self.steps:
            self._move(model, optimizer, state.global_step)

    def save_beside(self, folder: Path, process: int) -> None:
        """Put the events so far into the folder of a checkpoint."""
        write_json(folder / EVENTS, [asdict(event) for event in self.history])

    def load_beside(self, folder: Path, process: int) -> None:
        """Take them from there.

        Raises:
            UserError: the file is missing or damaged.
        """
        kept = read_json(folder / EVENTS, list, AGAIN)
        try:
            self.history = TypeAdapter(list[AllocationEvent]).validate_python(kept)
        except ValidationError as error:
            raise UserError(f"{folder / EVENTS} is damaged ({first_line(error)}): {AGAIN}") from error

    def _move(self, model: nn.Module, optimizer: Optimizer, step: int) -> None:
        started = time.perf_counter()
        scores = self._scores(model, self.rows[self.steps.index(step) % len(self.rows)])
        adapter = active_adapter(model)
        count, before = self._count(model, adapter), _ranks(model, adapter)
        kept, added = choose(scores, count)
        resize_adapter(model, kept, added, optimizer)
        values = torch.cat(list(scores.values()))
        event = AllocationEvent(
            step=step,
            moved=count,
            ranks_before=before,
            ranks=dict.fromkeys(before, 0) | _ranks(model, adapter),
            lowest=float(values.min()),
            highest=float(values.max()),
            highest_cut=float(values.sort().values[count - 1]),
            seconds=time.perf_counter() - started,
        )
        self.history.append(event)
        message = "step %d: %d of %d directions moved in %.1f s; %d layers lost their adapter"
        logger.info(message, step, count, len(values), event.seconds, len(event.removed))

    def _scores(self, model: nn.Module, parts: list[Part]) -> dict[str, Tensor]:
        """Of each direction on all parts together: a score is linear in the loss, and that is their weighted mean."""
        every = [importance(model, partial(self._loss, batch=part.batch)) for part in parts]
        weights = torch.tensor([part.weight for part in parts], dtype=torch.float64)
        return {name: weights / weights.sum() @ torch.stack([scores[name] for scores in every]) for name in every[0]}

    def _loss(self, model: nn.Module, batch: Any) -> Tensor:
        loss: Tensor = self.trainer.compute_loss(model, dict(batch))
        return loss

    def _count(self, model: nn.Module, adapter: str) -> int:
        return max(1, round(self.share * _total(model, adapter)))


def _ranks(model: nn.Module, adapter: str) -> dict[str, int]:
    return {name: layer.r[adapter] for name, layer in adapted_layers(model, adapter)}


def _total(model: nn.Module, adapter: str) -> int:
    return sum(_ranks(model, adapter).values())
