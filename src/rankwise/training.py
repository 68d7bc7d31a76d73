"""One stage of a run: which trainer, with which settings, seen how."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from rankwise.errors import UserError
from rankwise.likelihood import answer_log_probabilities
from rankwise.preferences import SoftmaxDPOConfig, SoftmaxDPOTrainer
from rankwise.ranks import SoraConfig, gate_counts, sora_optimizer
from rankwise.schema import LoraSettings, SftStage, SoftmaxDpoStage, SoraSettings
from rankwise.tokenise import AnswerCollator

Rows = Sequence[Mapping[str, Any]]


class AnswerTrainer(Trainer):
    """``transformers.Trainer`` whose loss is the mean cross-entropy of answer tokens, in nats.

    The output head runs from the batch's earliest answer token on, not over the prompts.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the tokens of all accumulated batches

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Trainer's hook."""
        values, mask = answer_log_probabilities(model, inputs)
        loss = -values.sum() / (mask.sum() if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes, tokens were added up
        return (loss, {}) if return_outputs else loss


class ProgressBar(TrainerCallback):
    """A bar with the loss, the rate in rows a second, and the time left; off the terminal, a line for every tenth."""

    def __init__(self, title: str, console: Console) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),  # copes with a total that is not known yet
            TextColumn("steps, loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]} rows/s"),
            TimeRemainingColumn(),
        )
        self.console = console
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.progress.add_task(title, total=None, loss="-", rate="-")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Know the number of steps."""
        self.rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.progress.reset(self.task, total=state.max_steps, loss="-", rate="-")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move the bar."""
        task = self.progress.tasks[self.task]
        rate = f"{state.global_step * self.rows / max(task.elapsed or 0.0, 1e-9):.0f}"
        self.progress.update(self.task, completed=state.global_step, rate=rate)
        tenth = 10 * state.global_step // state.max_steps
        if not self.console.is_terminal and tenth > 10 * (state.global_step - 1) // state.max_steps:
            left = (task.elapsed or 0.0) * (state.max_steps / state.global_step - 1)
            loss = f"loss {task.fields['loss']}, {rate} rows/s, {left:.0f} s left"
            self.console.print(
                f"{task.description}: {state.global_step}/{state.max_steps} steps, {loss}", highlight=False
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Show the loss."""
        if logs and "loss" in logs:
            self.progress.update(self.task, loss=f"{float(logs['loss']):.3f}")


class MetricsFile(TrainerCallback):
    """Append what is logged to ``metrics.jsonl``, a JSON object a line."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.stage = path, stage

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Write one line."""
        line = {
            "stage": self.stage,
            "step": state.global_step,
            **{name: float(value) for name, value in (logs or {}).items()},
        }
        if isinstance(model, PeftModel) and isinstance(model.peft_config[model.active_adapter], SoraConfig):
            line |= gate_counts(model)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class StopOnNan(TrainerCallback):
    """Stop a training whose loss is no number, with the step."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Raise where the logged loss is NaN or infinite; after the last step only the mean of the stage is logged."""
        found = logs or {}
        loss = float(found.get("loss", found.get("train_loss", 0.0)))
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {state.global_step}: lower the stage's learning_rate")


def train_stage(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    stage: SftStage | SoftmaxDpoStage,
    rows: Rows,
    *,
    adapter: LoraSettings,
    context: int,
    folder: Path,
    seed: int,
    bfloat16: bool,
    console: Console,
    trainer: Callable[..., Trainer] | None = None,
) -> dict[str, int]:
    """Train the active adapter for one stage.

    Args:
        model: the base with its adapter; changed in place.
        tokenizer: the model's.
        stage: the stage's settings.
        rows: encoded rows for ``sft``; rows of prompt, chosen and rejected for ``softmax_dpo``.
        adapter: the recipe's adapter settings.
        context: most tokens of a row.
        folder: the run's folder, whose ``metrics.jsonl`` grows.
        seed: of the order of rows and of dropout.
        bfloat16: whether to compute in bfloat16 (parameters stay float32).
        console: where progress is shown.
        trainer: makes the trainer of an sft stage; :class:`AnswerTrainer` where it is not given.

    Returns:
        Counts of rows that were cut or dropped.

    Raises:
        UserError: the loss became NaN or infinite.
    """
    steps = math.ceil(len(rows) / (stage.batch_size * stage.accumulation)) * stage.epochs
    settings = _arguments(stage, folder, seed, bfloat16, steps)
    bar = ProgressBar(stage.name, console)
    callbacks = [bar, StopOnNan(), MetricsFile(folder / "metrics.jsonl", stage.name)]
    if isinstance(stage, SoftmaxDpoStage):
        arguments = SoftmaxDPOConfig(**settings, beta=stage.beta, context=context)
        cut = [{**row, "rejected": row["rejected"][: stage.negatives]} for row in rows]
        made: Trainer = SoftmaxDPOTrainer(model, arguments, cut, processing_class=tokenizer, callbacks=callbacks)
    else:
        make = trainer or (lambda **kwargs: AnswerTrainer(data_collator=AnswerCollator.of(tokenizer), **kwargs))
        made = make(model=model, args=TrainingArguments(**settings), train_dataset=list(rows), callbacks=callbacks)
    made.remove_callback(PrinterCallback)
    made.optimizer = _optimizer(model, stage, adapter)
    with bar.progress:
        made.train()
    return dict(getattr(made, "counts", {}))


def _optimizer(model: PeftModel, stage: SftStage | SoftmaxDpoStage, adapter: LoraSettings) -> Optimizer | None:
    """AdamW with what the adapter needs beside it; None leaves it to the trainer."""
    if isinstance(adapter, SoraSettings):
        return sora_optimizer(model, lr=stage.learning_rate, gate_lr=adapter.gate_lr, weight_decay=stage.weight_decay)
    if adapter.lora_plus_ratio is None:
        return None
    made: Optimizer = create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=stage.learning_rate,
        loraplus_lr_ratio=adapter.lora_plus_ratio,
        loraplus_lr_embedding=stage.learning_rate,
        loraplus_weight_decay=stage.weight_decay,
        weight_decay=stage.weight_decay,
    )
    return made


def _arguments(
    stage: SftStage | SoftmaxDpoStage, folder: Path, seed: int, bfloat16: bool, steps: float
) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "num_train_epochs": stage.epochs,
        "per_device_train_batch_size": stage.batch_size,
        "per_device_eval_batch_size": 2 * stage.batch_size,
        "gradient_accumulation_steps": stage.accumulation,
        "learning_rate": stage.learning_rate,
        "lr_scheduler_type": stage.schedule if stage.schedule != "constant" else "constant_with_warmup",
        "warmup_steps": float(math.ceil(stage.warmup * steps)),
        "weight_decay": stage.weight_decay,
        "max_grad_norm": stage.clip,
        "logging_steps": float(max(1, round(steps / 50))),
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "seed": seed,
        "bf16": bfloat16,
        "use_cpu": not torch.cuda.is_available(),  # bfloat16 is refused on a CPU that was not asked for
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,
        "report_to": "none",
    }
