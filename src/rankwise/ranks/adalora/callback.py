"""AdaLoRA's allocation under transformers' Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.ranks.adalora.allocation import AdaloraAllocation, Allocated
from rankwise.ranks.adalora.checks import check_arguments

ALLOCATOR = "adalora.safetensors"  # beside a trainer's checkpoint: what PEFT's allocator would forget


class AdaloraCallback(TrainerCallback):
    """Drives AdaLoRA's allocation under ``transformers.Trainer``: see :class:`AdaloraAllocation`.

    Checkpoints of the Trainer get ``adalora.safetensors``, and a run that resumes from one ends as it would have
    without the interruption. (PEFT by itself forgets the importance, and saves cut matrices that do not load into the
    adapter they came from.)

    The Trainer of transformers divides a language model's loss by the tokens of all accumulated batches, and then adds
    PEFT's orthogonality term whole for each of them; :class:`rankwise.training.AnswerTrainer` weighs it once.

    Args:
        checkpoint: folder that a resumed run goes on from, where it is not ``output_dir/checkpoint-<step>``.

    Attributes:
        history: the allocations of the training, in order.

    Raises:
        UserError: when training begins, as :class:`AdaloraAllocation`; and with DeepSpeed or FSDP, with reentrant
            gradient checkpointing in several processes, or where a resumed run finds no ``adalora.safetensors``.
    """

    def __init__(self, checkpoint: str | Path | None = None) -> None:
        self.checkpoint = checkpoint
        self.allocation: AdaloraAllocation | None = None
        self._saved: str | None = None  # the checkpoint that has been saved by the trainer itself

    @property
    def history(self) -> Sequence[Allocated]:
        """The allocations so far."""
        return self.allocation.history if self.allocation is not None else []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Check everything that would make the allocation fail, or not happen."""
        check_arguments(args)
        self.allocation = AdaloraAllocation(model, state.max_steps)
        config = self.allocation.config
        if config.orth_reg_weight and config.task_type is None:
            warnings.warn(
                "the adapter has no task_type, so that PEFT leaves the orthogonality term out of the loss of the "
                "model's own forward: give the config one (rankwise's AnswerTrainer and SoftmaxDPOTrainer add it)",
                stacklevel=2,
            )
        if state.global_step:
            folder = self.checkpoint or Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self.allocation.load(Path(folder) / ALLOCATOR, state.global_step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Allocate; the gradients are still there, unless the step is left out, and the step is not counted yet."""
        left_out = model is not None and all(weight.grad is None for weight in model.parameters())
        if self.allocation is not None and not left_out:
            self.allocation.step(state.global_step + 1)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Put the allocator's state beside the checkpoint, where the trainer has not asked for it."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if folder.is_dir() and self._saved != folder.name:
            self.save_beside(folder, 0 if state.is_world_process_zero else 1)
        self._saved = None

    def save_beside(self, folder: Path, process: int) -> None:
        """Put the allocator's state into the folder of a checkpoint."""
        if self.allocation is not None and process == 0:
            self.allocation.save(folder / ALLOCATOR)
            self._saved = folder.name

    def load_beside(self, folder: Path, process: int) -> None:
        """Go on from this folder: read when the training begins."""
        self.checkpoint = folder

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """State the ranks."""
        if self.allocation is not None:
            self.allocation.finish()
