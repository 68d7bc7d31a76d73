"""Steps whose loss or gradient is no number: told with the rows that they saw, before a weight is changed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from rankwise.errors import UserError
from rankwise.processes import any_of, gathered

OnNan = Literal["stop", "skip"]
NAMED = 8  # rows that an error names
END = 40  # characters of each that it shows


class FiniteTrainer(Trainer):
    """``transformers.Trainer`` that looks at the loss and the gradient of each step before the weights change.

    Where one is NaN or infinite the training stops, with the step and its rows; or the step is left out and counted,
    and the optimizer and its schedule of gates know nothing of it. Steps that a gradient scaler leaves out, to find
    its scale, are its own. The gradient's norm is over what is trained.

    Attributes:
        on_nan: ``stop`` or ``skip``.
        tokenizer: writes out the rows that an error names; ``processing_class`` where it is None.
        skipped: steps that were left out.
    """

    on_nan: OnNan = "stop"
    tokenizer: PreTrainedTokenizerBase | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.skipped = 0
        self._seen: list[tuple[Any, Tensor]] = []  # the batches of this step, and their losses
        self._norm: Any = 0.0  # of this step's gradient
        self.add_callback(_LookAtSteps(self))

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Trainer's own; the batch and its loss are remembered until the step is taken."""
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        self._seen.append((inputs, loss))
        return loss if self.on_nan == "stop" else loss.nan_to_num(0.0, 0.0, 0.0)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Trainer's hook: the norm before the gradient is clipped, and without a scaler's scale."""
        self._norm = super()._get_grad_norm(model, grad_norm)
        return self._norm

    def look(self, model: nn.Module) -> None:
        """Look at the step that is about to be taken.

        Raises:
            UserError: its loss or gradient is no number, and ``on_nan`` is ``stop``.
        """
        seen, self._seen = self._seen, []
        losses = torch.stack([loss.detach().float() for _, loss in seen])
        norm = float(self._norm or 0.0)  # DeepSpeed may not know it
        scaled = self.accelerator.scaler is not None
        (bad,) = any_of(self.args.device, not bool(losses.isfinite().all()) or not (scaled or math.isfinite(norm)))
        if not bad:
            return
        if self.on_nan == "stop":
            raise UserError(self._told(losses, norm, [inputs for inputs, _ in seen]))
        self.skipped += 1
        for weight in model.parameters():
            weight.grad = None

    def _told(self, losses: Tensor, norm: float, batches: list[Any]) -> str:
        """What is not finite, where, and what to do; the same in each process."""
        unlike = losses[~losses.isfinite()]
        own = sorted({number for inputs in batches for number in self._row_numbers(inputs)})
        found = torch.full((NAMED + 3,), -1.0, dtype=torch.float64)  # whether, the loss, how many rows, the first ones
        found[:3] = torch.tensor([len(unlike) > 0, unlike[0] if len(unlike) else 0.0, len(own)])
        found[3 : 3 + min(len(own), NAMED)] = torch.tensor(own[:NAMED])
        each = gathered(found.to(self.args.device)).tolist()
        told = [one for one in each if one[0]] or each  # only the gradient is no number: any row may be why
        what = f"the loss is {told[0][1]}" if told[0][0] else f"the gradient's norm is {norm}"
        rows = sorted({int(number) for one in told for number in one[3:] if number > 0})
        more = int(sum(one[2] for one in told)) - len(rows[:NAMED])
        named = ", ".join(map(self._named, rows[:NAMED])) + (f" and {more} more" if more > 0 else "")
        seen = f", on rows {named} of those that are trained on" if rows else ""
        where = f"at step {self.state.global_step + 1}{seen}"
        home = Path(self._get_output_dir(None))
        last = get_last_checkpoint(home) if home.is_dir() else None
        kept = "" if last is None else f", and the last checkpoint is {last}"
        return (
            f"{what} {where}: lower the stage's learning_rate, look at these rows, or leave such steps out (on_nan: "
            f"skip); the weights are as they were before the step{kept}"
        )

    def _named(self, number: int) -> str:
        """A row that is trained on: its number, which files do not know, and how it ends; many begin alike."""
        tokenizer = self.tokenizer or self.processing_class
        if not isinstance(tokenizer, PreTrainedTokenizerBase) or self.train_dataset is None:
            return str(number)
        text = str(tokenizer.decode(self._tokens(self.train_dataset[number - 1])[-END:], skip_special_tokens=True))
        return f"{number} (... {' '.join(text.split())[-END:]!r})"

    def _tokens(self, row: Any) -> list[int]:
        """What a row that is trained on says."""
        tokens: list[int] = row["input_ids"]
        return tokens

    def _row_numbers(self, inputs: Any) -> Iterable[int]:
        """Which of the rows that are trained on a batch was made of, from 1: those that have its tokens."""
        if not isinstance(inputs, Mapping) or "input_ids" not in inputs or self.train_dataset is None:
            return []
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        batch = {tuple(ids[there.bool()].tolist()) for ids, there in zip(inputs["input_ids"], mask, strict=True)}
        return [number for number, row in enumerate(self.train_dataset, 1) if tuple(row["input_ids"]) in batch]


class _LookAtSteps(TrainerCallback):
    """Has the trainer look at each step."""

    def __init__(self, trainer: FiniteTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Trainer's hook: what an earlier training saw is forgotten."""
        self.trainer._seen = []

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Trainer's hook; gradients of all batches and processes are there."""
        self.trainer.look(model)
