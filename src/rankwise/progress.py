"""How a run is seen: a bar, a file of metrics, and logs on the console."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.checkpoints.resuming import forget_after
from rankwise.files import to_json
from rankwise.ranks import SoraConfig, gate_counts, gates
from rankwise.saying import say


class ProgressBar(TrainerCallback):
    """A bar with the loss, the rate in rows a second, and the time left; off the terminal, a line for every tenth."""

    def __init__(self, title: str, console: Console) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
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
        self.begun = state.global_step
        self.progress.reset(self.task, total=state.max_steps, loss="-", rate="-")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move the bar."""
        task = self.progress.tasks[self.task]
        done, elapsed = state.global_step - self.begun, task.elapsed or 0.0
        rate = f"{done * self.rows / max(elapsed, 1e-9):.0f}"
        self.progress.update(self.task, completed=state.global_step, rate=rate)
        tenth = 10 * state.global_step // state.max_steps
        if not self.console.is_terminal and tenth > 10 * (state.global_step - 1) // state.max_steps:
            left = elapsed * (state.max_steps - state.global_step) / done
            loss = f"loss {task.fields['loss']}, {rate} rows/s, {left:.0f} s left"
            say(self.console, f"{task.description}: {state.global_step}/{state.max_steps} steps, {loss}")

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
    """Append what is logged to ``metrics.jsonl``, a JSON object a line.

    With SoRA a line has what the gates leave, and the threshold. The first line, the last and one for each tenth of the
    training have ``ranks`` too: the open gates of each layer.
    """

    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.stage = path, stage
        self.tenth = -1

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Drop what an earlier training of this stage logged after the step from which this one goes on."""
        self.begun = state.global_step
        steps = forget_after(self.path, self.stage, self.begun)
        self.tenth = 10 * max(steps, default=-1) // max(state.max_steps, 1)

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
        line: dict[str, Any] = {"stage": self.stage, "step": state.global_step}
        if isinstance(model, PeftModel) and isinstance(config := model.peft_config[model.active_adapter], SoraConfig):
            line |= {"threshold": config.threshold, **gate_counts(model)}
            tenth = 10 * state.global_step // max(state.max_steps, 1)
            if tenth > self.tenth:
                self.tenth = tenth
                line["ranks"] = {name: int((gate != 0).sum()) for name, gate in gates(model).items()}
        if "train_runtime" in (logs or {}):
            line["steps_timed"] = state.global_step - self.begun
        line |= {name: value if isinstance(value, int) else float(value) for name, value in (logs or {}).items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(to_json(line) + "\n")


class ConsoleLog(logging.Handler):
    """Prints log records on a console, one every few seconds at most: work that is soon done says nothing.

    Args:
        console: where to.
        seconds: between two of them, and before the first.
    """

    def __init__(self, console: Console, seconds: float = 5.0) -> None:
        super().__init__(logging.INFO)
        self.console, self.seconds = console, seconds
        self.last = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        """The handler's hook."""
        if time.monotonic() - self.last >= self.seconds:
            self.last = time.monotonic()
            say(self.console, f"  {record.getMessage()}", dim=True)


@contextlib.contextmanager
def logs_shown(console: Console, seconds: float = 5.0) -> Iterator[None]:
    """Show the progress that rankwise logs, while the block runs."""
    logger = logging.getLogger("rankwise")
    handler, level = ConsoleLog(console, seconds), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
