"""One stage of a run: which trainer, with which settings, seen how."""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainingArguments,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from rankwise.attention import fast_attention
from rankwise.checkpoints import CheckpointedTrainer
from rankwise.checkpoints.resuming import checkpoints_of
from rankwise.checkpoints.stopping import SaveInTime, StopRequest
from rankwise.errors import UserError
from rankwise.likelihood import answer_log_probabilities
from rankwise.optimisation import add_allocation, hold_out, record_allocation, training_tools
from rankwise.peft_bridge import active_adapter
from rankwise.preferences import SoftmaxDPOConfig, SoftmaxDPOTrainer
from rankwise.preferences.negatives import Catalogue
from rankwise.processes import Processes
from rankwise.progress import MetricsFile, ProgressBar
from rankwise.ranks import SoraConfig, match_ranks
from rankwise.ranks.adalora.orthogonality import orthogonality_loss
from rankwise.schema import AdapterSettings, SftStage, SoftmaxDpoStage
from rankwise.tokenise import AnswerCollator

Rows = Sequence[Mapping[str, Any]]
TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",), "wandb": ("wandb",)}
SKIPPED = "steps left out, as their loss or gradient was no number"
TWICE = "rows seen twice in an epoch, so that its last batch is shared out evenly"
EVALUATED = 2  # rows of a batch of evaluation, for each of a batch of training


class AnswerTrainer(CheckpointedTrainer):
    """``transformers.Trainer`` whose loss is the mean cross-entropy of answer tokens, in nats.

    While it trains AdaLoRA, the loss has its orthogonality term too, once for each optimizer step.
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
        if self.model.training:
            # The trainer itself divides by the accumulated batches, where the loss is not divided by all their tokens.
            batches = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + orthogonality_loss(self.model) / batches
        return (loss, {}) if return_outputs else loss


def check_trackers(names: Sequence[str]) -> None:
    """See that what is logged to is installed.

    Raises:
        UserError: one is not.
    """
    for name in names:
        if not any(importlib.util.find_spec(package) for package in TRACKERS[name]):
            raise UserError(f"log_to {name} is not installed: pip install {name}, or leave it out")


def train_stage(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    stage: SftStage | SoftmaxDpoStage,
    rows: Rows,
    *,
    adapter: AdapterSettings,
    context: int,
    folder: Path,
    seed: int,
    bfloat16: bool,
    console: Console,
    trainer: Callable[..., CheckpointedTrainer] | None = None,
    catalogue: Catalogue | None = None,
    log_to: Sequence[str] = (),
    every: float | None = None,
    checkpoint: Path | None = None,
    processes: Processes | None = None,
) -> dict[str, int]:
    """Train the active adapter for one stage; several processes share the rows of each step.

    Args:
        model: the base with its adapter; changed in place.
        tokenizer: the model's.
        stage: the stage's settings.
        rows: encoded rows for ``sft``; rows of prompt, chosen and rejected for ``softmax_dpo``.
        adapter: the recipe's adapter settings.
        context: most tokens of a row.
        folder: the run's folder, whose ``metrics.jsonl`` grows; checkpoints are in ``checkpoints/<stage>``.
        seed: of the order of rows and of dropout.
        bfloat16: whether to compute in bfloat16 (parameters stay float32, and so does attention where
            :mod:`rankwise.attention` says).
        console: where progress is shown.
        trainer: makes the trainer of an sft stage; :class:`AnswerTrainer` where it is not given.
        catalogue: answers that rejected ones may be drawn from.
        log_to: trackers that get the log too, as :func:`check_trackers` knows them.
        every: seconds between two checkpoints; only where the training is asked to stop, if None.
        checkpoint: of this stage, to go on from.
        processes: those that train together, the first of which writes; those that the environment tells of, if None.

    Returns:
        Counts of rows that were cut, dropped, held out or seen twice, and of directions that were moved.

    Raises:
        UserError: the loss became NaN or infinite, the stage has too few steps or rows for its adapter, or a batch
            cannot be shared out.
        Stopped: the process was asked to end; a checkpoint is there.
    """
    processes = processes or Processes()
    rows, held = hold_out(rows, adapter, EVALUATED * stage.batch_size, seed)
    settings = _arguments(stage, folder, seed, bfloat16, total_steps(stage, len(rows)), processes)
    bar, stop = ProgressBar(stage.name, console), StopRequest()
    callbacks = [bar, SaveInTime(every, stop)]
    if isinstance(stage, SoftmaxDpoStage):
        arguments = SoftmaxDPOConfig(**settings, **_preference_settings(stage), max_length=context)
        made: CheckpointedTrainer = SoftmaxDPOTrainer(
            model,
            arguments,
            rows,
            held or None,
            processing_class=tokenizer,
            catalogue=catalogue,
            callbacks=callbacks,
        )
    else:
        make = trainer or (lambda **kwargs: AnswerTrainer(data_collator=AnswerCollator.of(tokenizer), **kwargs))
        made = make(
            model=model,
            args=TrainingArguments(
                **settings, train_sampling_strategy="group_by_length" if stage.group_by_length else "random"
            ),
            train_dataset=rows,
            eval_dataset=held or None,
            callbacks=callbacks,
        )
    made.remove_callback(PrinterCallback)
    made.checkpoint_folder, made.on_nan, made.tokenizer = checkpoints_of(folder, stage.name), stage.on_nan, tokenizer
    if checkpoint is not None:
        _match(model, checkpoint)
    tools = training_tools(model, stage, adapter, total_steps(stage, len(made.train_dataset)))
    made.optimizer = tools.optimizer
    trackers = [make() for make in get_reporting_integration_callbacks(list(log_to))]
    metrics = [MetricsFile(folder / "metrics.jsonl", stage.name)] if processes.is_first else []
    for callback in (*tools.callbacks, *metrics, *trackers):
        made.add_callback(callback)  # the file and trackers are last: they hold what the others add to the log
    allocation = add_allocation(made, adapter)
    attention = fast_attention(made.args.device, torch.bfloat16 if bfloat16 else model.dtype)
    with bar.progress, _threshold(model, stage), attention, stop.watched():
        try:
            made.train(checkpoint)
        finally:  # accelerate leaves its autocast around the model's forward: what follows would not be float32
            made.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    step = made.state.global_step
    saved = (made.checkpoint_folder / f"{PREFIX_CHECKPOINT_DIR}-{step}").is_dir()
    stop.check(f"stage {stage.name}, step {step} of {made.state.max_steps}", saved)
    counts = dict(getattr(made, "counts", {})) | ({SKIPPED: made.skipped} if made.skipped else {})
    if twice := -len(made.train_dataset) % stage.batch_size if processes.number > 1 else 0:
        counts[TWICE] = twice
    return counts if allocation is None else counts | record_allocation(allocation, folder, stage.name, len(held))


def _preference_settings(stage: SoftmaxDpoStage) -> dict[str, Any]:
    """Settings of softmax-DPO that a stage has by the same names, and those that it calls otherwise."""
    same = (
        "beta",
        "reference",
        "reference_cache",
        "label_smoothing",
        "length_normalised",
        "sft_weight",
        "weigh_negatives",
        "hardness",
        "mine_every",
        "mine_pool",
    )
    return {
        "negatives": stage.draw,
        "negative_stages" if isinstance(stage.negatives, list) else "num_negatives": stage.negatives,
        **{name: getattr(stage, name) for name in same},
    }


def _match(model: PeftModel, checkpoint: Path) -> None:
    """Give the adapter the checkpoint's ranks before its optimizer is made; the threshold stays the recipe's."""
    before = model.peft_config[active_adapter(model)]
    match_ranks(model, checkpoint)
    config = model.peft_config[active_adapter(model)]
    if isinstance(config, SoraConfig):
        config.threshold = before.threshold


@contextlib.contextmanager
def _threshold(model: PeftModel, stage: SftStage | SoftmaxDpoStage) -> Iterator[None]:
    """Give SoRA the stage's own threshold, if it has one, while the stage trains."""
    config, own = model.peft_config[active_adapter(model)], getattr(stage, "threshold", None)
    if own is None:
        yield
        return
    assert isinstance(config, SoraConfig)  # the recipe was checked
    before, config.threshold = config.threshold, own
    try:
        yield
    finally:
        config.threshold = before


def total_steps(stage: SftStage | SoftmaxDpoStage, rows: int) -> int:
    """Optimizer steps of a stage over so many rows, in one process or several, as the Trainer counts them."""
    batches = math.ceil(rows / stage.batch_size)
    return math.ceil(max(math.ceil(batches / stage.accumulation), 1) * stage.epochs)


def _arguments(
    stage: SftStage | SoftmaxDpoStage, folder: Path, seed: int, bfloat16: bool, steps: int, processes: Processes
) -> dict[str, Any]:
    rows = processes.share_of(stage.batch_size, f"stage {stage.name}: batch_size")
    return {
        "output_dir": str(folder),
        "num_train_epochs": stage.epochs,
        "per_device_train_batch_size": rows,
        "per_device_eval_batch_size": EVALUATED * rows,
        "gradient_accumulation_steps": stage.accumulation,
        "ddp_broadcast_buffers": False,  # MiLoRA's start among them, which is the same everywhere and stays so
        "learning_rate": stage.learning_rate,
        "lr_scheduler_type": stage.schedule if stage.schedule != "constant" else "constant_with_warmup",
        "warmup_steps": float(math.ceil(stage.warmup * steps)),
        "weight_decay": stage.weight_decay,
        "max_grad_norm": stage.clip,
        "logging_steps": float(max(1, round(steps / 50))),
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",  # by SaveInTime
        "save_total_limit": 1,
        "seed": seed,
        "bf16": bfloat16,
        "use_cpu": not torch.cuda.is_available(),  # bfloat16 is refused on a CPU that was not asked for
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,
        "report_to": "none",
    }
