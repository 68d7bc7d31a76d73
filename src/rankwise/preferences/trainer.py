"""Train a policy on rows of a prompt, a chosen answer and any number of rejected ones."""

from __future__ import annotations

import itertools
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from jaxtyping import Bool, Float
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed

from rankwise.checkpoints import CheckpointedTrainer
from rankwise.checkpoints.state_file import read_state, write_state
from rankwise.errors import UserError
from rankwise.likelihood import unwrapped
from rankwise.preferences.batches import BatchMaker, SequenceBatch, answer_totals, by_answer, listed
from rankwise.preferences.checks import check_arguments, check_positions
from rankwise.preferences.config import OWN, SoftmaxDPOConfig
from rankwise.preferences.datasets import read_data
from rankwise.preferences.loss import softmax_dpo_loss
from rankwise.preferences.means import MEANS_FILE, RowMeans, RunningMeans
from rankwise.preferences.measures import preference_measures, ranking_measures
from rankwise.preferences.negatives import Catalogue
from rankwise.preferences.reference import choose_reference
from rankwise.preferences.reference_values import (
    CHECKED,
    ReferenceValues,
    autocast_dtype,
    check_resumed,
    write_check,
)
from rankwise.preferences.rows import PreferenceRow
from rankwise.ranks.adalora.orthogonality import orthogonality_loss
from rankwise.tokenise import padding_token
from rankwise.trees import TreeBatch, why_no_trees

REPLICATED = (
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_XPU,
    DistributedType.MULTI_NPU,
)


class SoftmaxDPOTrainer(CheckpointedTrainer):
    """``transformers.Trainer`` with the softmax-DPO loss, and with safe checkpoints (:class:`CheckpointedTrainer`).

    Rows are mappings with ``prompt``, ``chosen`` and ``rejected``: texts, the last a list of them of any length (rows
    may differ), or chat messages, as :func:`rankwise.preferences.rows.encode_preferences` says. Prompt and answers are
    tokenised apart; each answer ends with the end-of-text token. What the answers of a row share, its prompt above
    all, is computed once (:mod:`rankwise.trees`).

    Logged beside the loss, as means over rows: ``nll/chosen`` (the chosen answer's cross-entropy in nats a token), the
    measures of :func:`rankwise.preferences.measures.preference_measures`, and in evaluation those of
    :func:`rankwise.preferences.measures.ranking_measures` too.

    Args:
        model: a causal language model, usually with an adapter; it is changed in place.
        args: the settings.
        train_dataset: rows; a list or a ``datasets.Dataset``.
        eval_dataset: rows to evaluate on, optional, with rejected answers of their own whatever training draws.
        processing_class: the tokenizer.
        peft_config: of a new adapter for the model, optional.
        ref_model: a model to take as the reference in place of ``args.reference``.
        catalogue: answers to draw rejected ones from, where ``args.negatives`` says so.
        callbacks: as for ``Trainer``.

    Attributes:
        counts: what was cut or dropped while tokenising, and rows that will have too few negatives.

    Raises:
        UserError: what :func:`rankwise.preferences.rows.encode_preferences` refuses in a row, and
            :func:`rankwise.preferences.reference.choose_reference` in a reference.

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
        peft_config: PeftConfig | None = None,
        ref_model: nn.Module | None = None,
        catalogue: Catalogue | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        check_arguments(model, args, processing_class, peft_config, kwargs)
        assert processing_class is not None
        data = read_data(train_dataset, eval_dataset, processing_class, args, catalogue)
        self.counts, self._negatives = data.counts, data.negatives
        check_positions(model, data.longest)
        if peft_config is not None:
            set_seed(args.seed)
            model = get_peft_model(model, peft_config)
        self.reference = choose_reference(model, args.reference, args.reference_adapter, ref_model)
        super().__init__(
            model=model,
            args=args,
            train_dataset=data.train,
            eval_dataset=data.evaluation,
            processing_class=processing_class,
            data_collator=listed,
            callbacks=callbacks,
            **kwargs,
        )
        if self.args.n_gpu > 1:
            raise UserError(
                f"{self.args.n_gpu} GPUs in one process would share out parts of a row of trees: start a process for"
                " each (torchrun or accelerate launch), or let one be visible (CUDA_VISIBLE_DEVICES)"
            )
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the rows of all accumulated batches
        self._batch = self._batch_maker(padding_token(processing_class), data.longest)
        # Apart: an evaluation may come between two logs of the training.
        self._means, self._evaluated = RunningMeans(), RowMeans(len(self.eval_dataset or ()))
        self._prefix = "eval"
        self._parameters = sum(value.numel() for value in self.model.parameters())
        # Of answers that are drawn from elsewhere, the reference's log-probabilities are computed step by step.
        self._known_before = args.negatives in OWN
        self._reference_is_known = False
        self._first: list[list[float]] | None = None
        self._ahead: deque[Any] = deque()
        self._ahead_of: Any = None
        self._mined_before = 0  # batches whose hard answers a checkpoint has told

    def _batch_maker(self, padding: int, longest: int) -> BatchMaker:
        """Trees where they are wanted and the model takes them."""
        reason = why_no_trees(self.model, longest) if self.args.prefix_tree and longest else None
        if reason is not None:
            warnings.warn(f"each answer is computed with its own copy of the prompt: {reason}", stacklevel=3)
        return BatchMaker(padding, self.args.prefix_tree and reason is None, self.args.tokens_per_row)

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Compute the reference's log-probabilities where they are missing, then train.

        A training that goes on from a checkpoint needs the model as it was when it began, for the reference.

        Raises:
            UserError: nothing is trained, there is no checkpoint, or the reference is not the one that the checkpoint
                was trained against.
        """
        if not any(value.requires_grad for value in self.model.parameters()):
            raise UserError("no weight of the model is trained: load its adapter with is_trainable=True, or give one")
        checkpoint = self._checkpoint_of(resume_from_checkpoint)
        self._begin(checkpoint)
        self.compute_reference()
        self._ahead.clear()
        if self._negatives is not None:
            share = self.args.process_index, self.args.world_size
            self._mined_before = self._negatives.take_mined(checkpoint, *share) if checkpoint else 0
        return super().train(checkpoint, *args, **kwargs)

    def _begin(self, checkpoint: Path | None) -> None:
        """See that the reference is the one of the checkpoint; keep it where it is needed while training goes on."""
        if self.reference is None or self._first is not None:
            return
        rows = self.train_dataset[:CHECKED]
        self._first = self._reference_values().first(self.reference, rows)
        if checkpoint is not None:
            dtype = autocast_dtype(self.accelerator) or unwrapped(self.model).dtype
            check_resumed(checkpoint, rows, self._first, dtype)
        if not self._known_before:
            self.reference.keep()

    def save_beside(self, folder: Path, process: int) -> None:
        """Keep what tells the reference, what is mined, counted and to be logged, in a checkpoint too."""
        if process == 0 and self._first is not None:
            write_check(folder, self._first)
        if self._ahead and self._negatives is not None:
            self._negatives.keep_mined(folder, process, self.args.world_size, [one["rows"] for one in self._ahead])
        write_state(folder / MEANS_FILE.format(process), {"means": self._means.state(), "counts": dict(self.counts)})

    def load_beside(self, folder: Path, process: int) -> None:
        """Take what is to be logged from there; the rest was read before the reference was computed."""
        if (path := folder / MEANS_FILE.format(process)).is_file():
            kept = read_state(path)
            self._means.restore(kept["means"], self.args.device)
            self.counts.update(kept["counts"])

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Compute the reference's log-probabilities where they are missing, then evaluate on the trainer's own rows.

        Raises:
            UserError: other rows are given: their reference would be what the model is by now.
        """
        if eval_dataset is not None:
            raise UserError(
                "evaluate takes no rows: give eval_dataset to the trainer, before training changes the model"
            )
        self.compute_reference()
        self._evaluated.clear()  # of losses computed since the last one, by what scores directions, say
        self._prefix = metric_key_prefix
        was_prepared = bool(self.accelerator._models)
        found: dict[str, float] = super().evaluate(None, ignore_keys, metric_key_prefix)
        if not was_prepared and self.accelerator.distributed_type in REPLICATED:
            # Accelerate takes a model that it has prepared for evaluation as ready for training, and never wraps it
            # then: each process would train on its own.
            for model in self.accelerator._models:
                model._is_accelerate_prepared = False
            self.accelerator._models.clear()
        return found

    def compute_reference(self) -> None:
        """Fill in the reference's log-probabilities of the rows, once; each process computes a part of them."""
        if self._reference_is_known or self.reference is None:
            return
        parts = (self.train_dataset if self._known_before else None, self.eval_dataset)
        rows = [row for part in parts for row in part or ()]
        if rows:
            self._reference_values().fill(self.reference, rows, self.args.reference_cache, self.processing_class)
        self._reference_is_known = True

    def _reference_values(self) -> ReferenceValues:
        if self.place_model_on_device:
            self.model.to(self.args.device)
        size = self.args.per_device_eval_batch_size
        return ReferenceValues(self.accelerator, self._batch, size, self.accelerator.autocast)

    def _added_up(self, values: Tensor) -> Tensor:
        """The sum over processes."""
        total: Tensor = self.accelerator.reduce(values, "sum")
        return total

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Sequence[PreferenceRow]],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Trainer's hook: the mean loss of the rows, and AdaLoRA's orthogonality term while it trains.

        In training the mean is over the rows of all accumulated batches and processes.
        """
        losses = self._losses(model, inputs["rows"])
        if num_items_in_batch is None:
            loss = losses.mean()
        else:
            # Gradients are averaged over processes, and rows were added up.
            spread = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            loss = losses.sum() / num_items_in_batch * spread
        if self.model.training:
            batches = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + orthogonality_loss(self.model) / batches
        return (loss, {}) if return_outputs else loss

    def _losses(self, model: nn.Module, rows: Sequence[PreferenceRow]) -> Float[Tensor, " batch"]:
        """The loss of each row; records the measures."""
        settings, device = self.args, self.args.device
        if self.model.training and self._negatives is not None:
            rows = self._negatives.draw(rows, self._share, self._pass)
        batch = self._batch(rows).to(device)
        reference = self._reference_of(rows, batch)
        policy, exists = answer_totals(model, batch), batch.exists
        lengths = by_answer([[float(len(answer)) for answer in row.answers] for row in rows], 1.0).to(device)
        cross_entropy = -policy[:, 0] / lengths[:, 0]
        scale = lengths if settings.length_normalised else torch.ones_like(lengths)
        compared, against = policy / scale, reference / scale
        weights = self._weights(rows, compared - against, exists)
        losses = softmax_dpo_loss(
            compared[:, 0],
            compared[:, 1:],
            against[:, 0],
            against[:, 1:],
            settings.beta,
            exists[:, 1:],
            label_smoothing=settings.label_smoothing,
            weights=weights,
        )
        if settings.sft_weight:
            losses = losses + settings.sft_weight * cross_entropy
        measures = preference_measures(compared, against, exists, settings.beta, weights)
        measures |= {"logps/chosen": policy[:, 0].detach(), "nll/chosen": cross_entropy.detach()}
        if settings.length_normalised:
            whole = preference_measures(policy, reference, exists, settings.beta)
            measures["logps/rejected"] = whole["logps/rejected"]
        self._record(rows, measures | {"loss": losses.detach()}, ranking_measures(policy, exists))
        return losses

    def _record(
        self, rows: Sequence[PreferenceRow], measures: Mapping[str, Tensor], ranking: Mapping[str, Tensor]
    ) -> None:
        """Keep what is logged: of training, and of the rows of an evaluation."""
        if self.model.training:
            self._means.add({name: values for name, values in measures.items() if name != "loss"})
            return
        first = 1 + len(self.train_dataset or ())
        if all(row.number >= first for row in rows):
            self._evaluated.add([row.number - first for row in rows], {**measures, **ranking})

    def _reference_of(
        self, rows: Sequence[PreferenceRow], batch: TreeBatch | SequenceBatch
    ) -> Float[Tensor, "batch answers"]:
        """Log-probabilities under the reference, computed now where they were not before; zeros without a reference."""
        known = [row.reference for row in rows if row.reference is not None]
        if len(known) == len(rows):
            return by_answer(known, 0.0).to(self.args.device)
        if self.reference is None:
            return torch.zeros(batch.exists.shape, device=self.args.device)
        with self.reference.active() as model, self.accelerator.autocast():
            return answer_totals(model, batch)

    def _weights(
        self,
        rows: Sequence[PreferenceRow],
        ratios: Float[Tensor, "batch answers"],
        exists: Bool[Tensor, "batch answers"],
    ) -> Float[Tensor, "batch negatives"] | None:
        """Of the rejected answers in the loss, or None where all weigh the same."""
        settings, there = self.args, exists[:, 1:]
        weights: Tensor | None = None
        if settings.weigh_negatives:
            drawn = [row.weights or [1.0] * (len(row.answers) - 1) for row in rows]
            weights = by_answer(drawn, 1.0).to(self.args.device)
        if settings.hardness:
            margins = settings.beta * (ratios[:, 1:] - ratios[:, :1]).detach()
            hard = torch.where(there, settings.hardness * margins, -torch.inf).softmax(dim=1)
            hard = torch.where(there, hard * there.sum(dim=1, keepdim=True), 1.0)
            weights = hard if weights is None else weights * hard
        return weights

    @property
    def _share(self) -> float:
        """Of the training that is done."""
        share: float = self.state.global_step / max(1, self.state.max_steps)
        return min(1.0, share)

    @property
    def _pass(self) -> int:
        """Number of the pass over the rows, from 0."""
        return int(self.state.epoch or 0)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """Trainer's hook: the batches of a step; of several steps at once where hard answers are mined for them."""
        if self._negatives is None or self.args.negatives != "hard":
            return super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[no-any-return]
        if not self._ahead or self._ahead_of is not epoch_iterator:
            self._ahead_of = epoch_iterator
            known, self._mined_before = self._mined_before, 0
            self._ahead = deque(itertools.islice(epoch_iterator, known or self.args.mine_every * num_batches))
            if not known:
                self._mine([row for batch in self._ahead for row in batch["rows"]])
        batches = [self._ahead.popleft() for _ in range(min(num_batches, len(self._ahead)))]
        return batches, self._get_num_items_in_batch(batches, device)

    def _mine(self, rows: Sequence[PreferenceRow]) -> None:
        assert self._negatives is not None
        with self.accelerator.autocast():
            self._negatives.mine(self.model, rows, self._pass)

    def _row_numbers(self, inputs: Any) -> list[int]:
        """The base's hook: rows know their numbers."""
        return [row.number for row in inputs["rows"]]

    def _tokens(self, row: PreferenceRow) -> list[int]:
        """The base's hook: the row with its chosen answer."""
        return [*row.prompt, *row.answers[0]]

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """Trainer's hook: the loss of a batch, without gradients."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss: Tensor = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """Trainer's hook: the rows of the accumulated batches, of all processes."""
        rows = torch.tensor(sum(len(batch["rows"]) for batch in batch_samples), device=device)
        return self._added_up(rows) if self.args.average_tokens_across_devices else rows

    def floating_point_ops(self, inputs: Mapping[str, Sequence[PreferenceRow]]) -> int:
        """Trainer's hook: 6 for each parameter and token, of separate sequences."""
        tokens = sum(len(row.prompt) + len(answer) for row in inputs["rows"] for answer in row.answers)
        return 6 * int(tokens * self._parameters)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's hook: add the means since the last log; an evaluation's loss is its rows' mean as well."""
        prefix = self._prefix
        if f"{prefix}_loss" in logs:
            logs |= {f"{prefix}_{name}": value for name, value in self._evaluated.take(self._added_up).items()}
        elif "loss" in logs:
            logs |= self._means.take(self._added_up)
        super().log(logs, *args, **kwargs)
