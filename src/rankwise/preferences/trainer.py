"""Train a policy on rows of a prompt, a chosen answer and any number of rejected ones."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

from rankwise.errors import UserError
from rankwise.likelihood import answer_log_probabilities
from rankwise.preferences.loss import softmax_dpo_loss
from rankwise.preferences.rows import PreferenceCollator, PreferenceRow, encode_preferences
from rankwise.ranks.adalora.orthogonality import orthogonality_loss
from rankwise.tokenise import padding_token


@dataclass
class SoftmaxDPOConfig(TrainingArguments):
    """``transformers.TrainingArguments`` with the settings of softmax-DPO.

    Args:
        beta: strength of the tie to the reference; above 0. The paper uses 1.
        context: most tokens of a prompt with an answer; longer prompts are cut on the left, and counted.
        reference: ``start`` (the model as it is when training begins: after supervised fine-tuning, as in the paper) or
            ``base`` (the model with its adapter disabled). Log-probabilities are computed once, before training.

    Raises:
        UserError: a value out of its range.
    """

    beta: float = field(default=1.0, metadata={"help": "Strength of the tie to the reference, above 0."})
    context: int = field(default=1024, metadata={"help": "Most tokens of a prompt with an answer."})
    reference: Literal["start", "base"] = field(default="start", metadata={"help": "start or base."})

    def __post_init__(self) -> None:
        """Check the ranges; rows keep all their columns."""
        super().__post_init__()
        self.remove_unused_columns = False
        if not self.beta > 0:
            raise UserError(f"SoftmaxDPOConfig(beta={self.beta}) is not possible: it must be above 0")
        if self.reference not in ("start", "base"):
            raise UserError(f"SoftmaxDPOConfig(reference={self.reference!r}) is unknown: start or base")


class SoftmaxDPOTrainer(Trainer):
    """``transformers.Trainer`` with the softmax-DPO loss.

    Rows are mappings with ``prompt`` (text), ``chosen`` (text) and ``rejected`` (a list of texts of any length, one or
    more; rows may differ). Prompt and answers are tokenised apart; each answer ends with the end-of-text token.

    Logged beside the loss, as means: ``rewards/chosen``, ``rewards/rejected`` (beta times the log-ratio to the
    reference), ``rewards/margins``, ``rewards/accuracies`` (share of rows in which the chosen answer beats every
    rejected one), ``logps/chosen`` and ``logps/rejected``.

    Args:
        model: a causal language model, usually with an adapter.
        args: the settings.
        train_dataset: rows; a list or a ``datasets.Dataset``.
        eval_dataset: rows to evaluate on, optional.
        processing_class: the tokenizer.
        ref_model: a model to take as the reference in place of ``args.reference``.
        callbacks: as for ``Trainer``.

    Attributes:
        counts: what was cut or dropped while tokenising.

    Raises:
        UserError: a row without prompt, chosen or rejected, or no row that fits the context.

    Source: Softmax-DPO (arXiv 2406.09215). The reference is computed once instead of at each step, with the same
        result.
    """

    def __init__(
        self,
        model: nn.Module,
        args: SoftmaxDPOConfig,
        train_dataset: Iterable[Mapping[str, Any]] | None = None,
        eval_dataset: Iterable[Mapping[str, Any]] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        ref_model: nn.Module | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        if processing_class is None:
            raise UserError("SoftmaxDPOTrainer needs the tokenizer: give it as processing_class")
        self.counts: dict[str, int] = {}
        datasets = []
        for rows in (train_dataset, eval_dataset):
            encoded, counts = (None, {}) if rows is None else encode_preferences(rows, processing_class, args.context)
            datasets.append(encoded)
            for name, count in counts.items():
                self.counts[name] = self.counts.get(name, 0) + count
        super().__init__(
            model=model,
            args=args,
            train_dataset=datasets[0],
            eval_dataset=datasets[1],
            processing_class=processing_class,
            data_collator=PreferenceCollator(padding_token(processing_class)),
            callbacks=callbacks,
            **kwargs,
        )
        self.ref_model = ref_model
        self.model_accepts_loss_kwargs = False
        # Apart by prefix: an evaluation may come between two logs of the training.
        self._sums: dict[str, dict[str, float]] = {"": defaultdict(float), "eval_": defaultdict(float)}
        self._steps = {"": 0, "eval_": 0}
        self._reference_is_known = False

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the reference's log-probabilities where they are missing, then train."""
        self.compute_reference()
        return super().train(*args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Compute the reference's log-probabilities where they are missing, then evaluate on the trainer's own rows.

        Raises:
            UserError: other rows are given: their reference would be what the model is by now.
        """
        if eval_dataset is not None:
            raise UserError(
                "evaluate takes no rows: give eval_dataset to the trainer, before training changes the model"
            )
        self.compute_reference()
        self._sums["eval_"].clear()  # of losses computed since the last one, by what scores directions, say
        self._steps["eval_"] = 0
        return super().evaluate(None, *args, **kwargs)

    def compute_reference(self) -> None:
        """Fill in the reference's log-probabilities of every row, once."""
        if self._reference_is_known:
            return
        model: Any = self.ref_model or self.model
        base = self.args.reference == "base" and self.ref_model is None
        if base and not isinstance(model, PeftModel):
            raise UserError("reference 'base' needs a model with an adapter to disable: use 'start' or give ref_model")
        model.to(self.args.device)
        with model.disable_adapter() if base else contextlib.nullcontext():
            for rows in (self.train_dataset, self.eval_dataset):
                self._fill_reference(model, rows or [])
        self._reference_is_known = True

    @torch.no_grad()
    def _fill_reference(self, model: nn.Module, rows: Sequence[PreferenceRow]) -> None:
        was_training = model.training
        model.eval()
        size = self.args.per_device_eval_batch_size
        order = sorted(range(len(rows)), key=lambda index: rows[index].length)
        for start in range(0, len(rows), size):
            picked = [rows[index] for index in order[start : start + size]]
            batch = self._prepare_inputs(self.data_collator(picked))
            with self.compute_loss_context_manager():
                totals = answer_totals(model, batch)
            for row, values in zip(picked, totals.cpu(), strict=True):
                row.reference = values[: len(row.answers)].tolist()
        model.train(was_training)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Trainer's hook: the mean softmax-DPO loss of the batch, and AdaLoRA's orthogonality term while it trains."""
        policy = answer_totals(model, inputs)
        reference, mask = inputs["reference"], inputs["exists"]
        losses = softmax_dpo_loss(
            policy[:, 0], policy[:, 1:], reference[:, 0], reference[:, 1:], self.args.beta, mask[:, 1:]
        )
        self._record(policy.detach(), reference, mask)
        loss = losses.mean() + orthogonality_loss(self.model)
        return (loss, {}) if return_outputs else loss

    def _record(self, policy: Tensor, reference: Tensor, mask: Tensor) -> None:
        rewards = self.args.beta * (policy - reference)
        rejected = mask[:, 1:]
        best_rejected = rewards[:, 1:].masked_fill(~rejected, -torch.inf).max(dim=1).values
        values = {
            "rewards/chosen": rewards[:, 0].mean(),
            "rewards/rejected": rewards[:, 1:][rejected].mean(),
            "rewards/margins": rewards[:, 0].mean() - rewards[:, 1:][rejected].mean(),
            "rewards/accuracies": (rewards[:, 0] > best_rejected).float().mean(),
            "logps/chosen": policy[:, 0].mean(),
            "logps/rejected": policy[:, 1:][rejected].mean(),
        }
        prefix = "" if self.model.training else "eval_"
        for name, value in values.items():
            self._sums[prefix][name] += float(value)
        self._steps[prefix] += 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's hook: add the means since the last log."""
        prefix = "eval_" if "eval_loss" in logs else ""
        if self._steps[prefix] and f"{prefix}loss" in logs:
            logs |= {prefix + name: total / self._steps[prefix] for name, total in self._sums[prefix].items()}
            self._sums[prefix].clear()
            self._steps[prefix] = 0
        super().log(logs, *args, **kwargs)


def answer_totals(model: nn.Module, batch: Mapping[str, Tensor]) -> Float[Tensor, "batch answers"]:
    """Summed log-probability of every answer, chosen first; 0 where a row has no such answer."""
    tokens, _ = answer_log_probabilities(model, batch)
    totals = tokens.new_zeros(batch["exists"].shape)
    return totals.masked_scatter(batch["exists"], tokens.sum(dim=1))
