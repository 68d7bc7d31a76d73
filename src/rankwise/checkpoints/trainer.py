"""Checkpoints of a training: written whole or not at all, without pickle, and checked when they are read."""

from __future__ import annotations

import random
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, sort_checkpoints

from rankwise.checkpoints.finite import FiniteTrainer
from rankwise.checkpoints.order import OrderOfEpoch, tell_epoch
from rankwise.checkpoints.state_file import read_state, write_state
from rankwise.errors import UserError
from rankwise.files import check_folder, complete_folder, remove_folder
from rankwise.methods import load_stage
from rankwise.methods.in_place import save_whole, trains_all
from rankwise.processes import gathered, held_whole

STATE_FILE = "state.safetensors"
RANDOM_FILE = "random-{}.safetensors"  # of each process


@runtime_checkable
class KeptBeside(Protocol):
    """What has a state of its own that a checkpoint must hold: a trainer, or a callback."""

    def save_beside(self, folder: Path, process: int) -> None:
        """Write it into the folder of a checkpoint; called in each process, by its number."""

    def load_beside(self, folder: Path, process: int) -> None:
        """Read it again, when a training that resumes begins; before or after a callback's ``on_train_begin``."""


class CheckpointedTrainer(FiniteTrainer):
    """``transformers.Trainer`` whose checkpoints survive what happens to them, and which looks at each step.

    A checkpoint is in its place whole or not at all; it holds safetensors and JSON, no pickle, and a manifest with the
    SHA-256 of each file, without which, or with a file that is another, it is not read. A training that resumes in one
    process ends bit for bit as one that was not stopped; what it logs is the same too. Callbacks that are
    :class:`KeptBeside` are saved and restored with it. For steps that are no number see :class:`FiniteTrainer`.

    Attributes:
        checkpoint_folder: where checkpoints go; ``args.output_dir`` where it is None.
    """

    checkpoint_folder: Path | None = None
    _writing: Path | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._resumed: Path | None = None
        self._kept: dict[str, Any] = {}  # what the checkpoint told of the progress
        self._epoch_random = torch.get_rng_state()  # when the pass over the rows began
        self.add_callback(_Resume(self))

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own; the checkpoint is checked first.

        Raises:
            UserError: there is no checkpoint, it is not whole, or a file of it is not what was written.
        """
        self._resumed = self._checkpoint_of(resume_from_checkpoint)
        if self._resumed is not None:
            check_folder(self._resumed, whole=True)
        return super().train(self._resumed and str(self._resumed), *args, **kwargs)

    def _checkpoint_of(self, resume: str | Path | bool | None) -> Path | None:
        """What ``resume_from_checkpoint`` means: a path, or the last one where it is True."""
        if resume is not True:
            return Path(resume) if resume else None
        home = self._get_output_dir(None)
        last = get_last_checkpoint(home) if Path(home).is_dir() else None
        if last is None:
            raise UserError(f"there is no checkpoint in {home} to resume from: give its path")
        return Path(last)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        """Trainer's hook: several processes draw one order by length, each for itself, and again at a resume."""
        made: Sampler[int] | None = super()._get_train_sampler(train_dataset)
        if self.args.world_size == 1 or not isinstance(made, LengthGroupedSampler):
            return made
        return OrderOfEpoch(made.batch_size * self.args.world_size, lengths=made.lengths, seed=self.args.seed)

    def _get_output_dir(self, trial: Any) -> str:
        """Trainer's hook: while a checkpoint is written, a place that nobody reads."""
        found: str = super()._get_output_dir(trial)
        return str(self._writing or self.checkpoint_folder or found)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's hook: write aside, then put in place."""
        home = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        aside = home / f".{name}.unfinished"
        if self.args.should_save:
            for left in home.glob(f".{PREFIX_CHECKPOINT_DIR}-*"):  # of a process that was killed, or of a full disk
                shutil.rmtree(left, ignore_errors=True)
            aside.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self._writing = aside
        try:
            super()._save_checkpoint(model, trial)
            for part in self._parts():
                part.save_beside(aside / name, self.args.process_index)
        finally:
            self._writing = None
        self.accelerator.wait_for_everyone()
        is_best = self.state.best_global_step == self.state.global_step
        if is_best:
            self.state.best_model_checkpoint = str(home / name)
        if self.args.should_save:
            if is_best:
                self.state.save_to_json(str(aside / name / "trainer_state.json"))
            complete_folder(aside / name, home / name)
            shutil.rmtree(aside)
            self._remove_older(home)
        self.accelerator.wait_for_everyone()

    def _remove_older(self, home: Path) -> None:
        """Keep ``save_total_limit`` checkpoints, and the best one beside the last."""
        limit, best = self.args.save_total_limit or 0, self.state.best_model_checkpoint
        known = sort_checkpoints(output_dir=str(home), best_model_checkpoint=best)
        if limit == 1 and best is not None and known[-1] != best:
            limit = 2
        for old in known[:-limit] if limit > 0 else []:
            remove_folder(Path(old))

    def _parts(self) -> Iterator[KeptBeside]:
        for part in (self, *self.callback_handler.callbacks):
            if isinstance(part, KeptBeside):
                yield part

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Trainer's hook: the weights, without the settings, which the Trainer pickles."""
        if state_dict is None and isinstance(self.model, PeftModel):
            state_dict = held_whole(self.model)
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            if isinstance(self.model, PeftModel) and trains_all(self.model):
                save_whole(self.model, folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Trainer's hook; the shards of an optimizer are written in the form of what shards it."""
        assert self.optimizer is not None and self.lr_scheduler is not None
        state: dict[str, Any] = {"progress": self._progress()}
        if self._is_sharded:
            super()._save_optimizer_and_scheduler(output_dir)
        else:
            scaler = self.accelerator.scaler
            state["optimizer"], state["scheduler"] = self.optimizer.state_dict(), self.lr_scheduler.state_dict()
            state["scaler"] = None if scaler is None else scaler.state_dict()
        if self.args.should_save:
            write_state(Path(output_dir) / STATE_FILE, state)

    def _progress(self) -> dict[str, Any]:
        """What the Trainer has summed up for its next log."""
        return {
            "loss": gathered(self._tr_loss).mean(dim=0),
            "total_loss": self._total_loss_scalar,
            "logged_at": self._globalstep_last_logged,
            "skipped": self.skipped,
            "epoch_random": self._epoch_random,
            "processes": self.args.world_size,
        }

    def _check_order(self, before: int) -> None:
        """Refuse to go on in the midst of an order by length that one process draws otherwise than several do."""
        now, by_length = self.args.world_size, self.args.train_sampling_strategy == "group_by_length"
        if by_length and (before == 1) != (now == 1) and not is_whole(self.state.epoch):
            raise UserError(
                f"{before} of the processes that drew batches by length wrote the checkpoint, and {now} would draw "
                "others: go on with one where it was one, and with several where there were several"
            )

    @property
    def _is_sharded(self) -> bool:
        return bool(self.is_deepspeed_enabled or self.is_fsdp_enabled)

    def _restore_progress(self, kept: dict[str, Any]) -> None:
        self._tr_loss.copy_(kept["loss"])
        self._total_loss_scalar, self._globalstep_last_logged = kept["total_loss"], kept["logged_at"]
        self.skipped = kept["skipped"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's hook: the mean loss at the end is that of all steps, also of those before a resume."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, *args, **kwargs)

    def _save_scaler(self, output_dir: str) -> None:
        """Trainer's hook: it is saved with the optimizer."""

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Trainer's hook: likewise."""

    def _save_rng_state(self, output_dir: str) -> None:
        """Trainer's hook: the generators of this process."""
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        write_state(Path(output_dir) / RANDOM_FILE.format(self.args.process_index), random_state())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Trainer's hook."""
        if isinstance(self.model, PeftModel) and not self._is_sharded:
            load_stage(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Trainer's hook."""
        if checkpoint is None:
            return
        assert self.optimizer is not None and self.lr_scheduler is not None
        state = read_state(Path(checkpoint) / STATE_FILE)
        self._kept = state["progress"]
        self._check_order(self._kept.get("processes", 1))
        if self._is_sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["scheduler"])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Trainer's hook."""
        if checkpoint is None:
            return
        path = Path(checkpoint) / RANDOM_FILE.format(self.args.process_index)
        if path.is_file():
            set_random_state(read_state(path))
            if is_whole(self.state.epoch):  # the next pass is about to begin
                self._epoch_random = torch.get_rng_state()
        else:
            warnings.warn(f"{path} is not there: the checkpoint is of fewer processes, dropout differs", stacklevel=2)


class _Resume(TrainerCallback):
    """Restores, when a training that resumes begins, what is neither weights nor the optimizer's."""

    def __init__(self, trainer: CheckpointedTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Trainer's hook."""
        trainer = self.trainer
        if trainer._resumed is not None:
            trainer._restore_progress(trainer._kept)
            for part in trainer._parts():
                part.load_beside(trainer._resumed, args.process_index)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, train_dataloader: Any, **_: Any
    ) -> None:
        """Trainer's hook: the order of batches by length is drawn next, from torch's own generator."""
        kept, self.trainer._kept = self.trainer._kept, {}
        if kept and not is_whole(state.epoch):
            torch.set_rng_state(kept["epoch_random"])
        self.trainer._epoch_random = torch.get_rng_state()
        if args.world_size > 1:
            tell_epoch(train_dataloader, int(state.epoch or 0))


def is_whole(epoch: float | None) -> bool:
    """Whether no pass over the rows was left in the middle."""
    return float(epoch or 0.0).is_integer()


def random_state() -> dict[str, Any]:
    """The states of the generators of Python, NumPy, torch, and of this process's GPUs."""
    found = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}  # noqa: NPY002
    return found | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators into what :func:`random_state` returned."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.asarray(keys), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
