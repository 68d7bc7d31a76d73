"""Language modelling and instructions: rows of tokens, measured by the loss on what is held out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from rankwise.checkpoints import CheckpointedTrainer
from rankwise.errors import UserError
from rankwise.models import load_language_model
from rankwise.preferences.negatives import Catalogue
from rankwise.recommend.store import Store
from rankwise.sampling import sample
from rankwise.schema import ModelSettings
from rankwise.tasks.language_loss import answer_loss
from rankwise.tasks.task import Measurement, Metrics

Rows = Sequence[Mapping[str, Any]]


class AnswerTask:
    """A :class:`rankwise.tasks.task.Task` over rows of ``input_ids`` and ``labels``."""

    task_type = "CAUSAL_LM"
    labels: list[str] = []  # noqa: RUF012 - none, and never changed
    columns: tuple[str, ...] = ("loss", "perplexity")
    trainer: Callable[..., CheckpointedTrainer] | None = None
    store: Store | None = None

    def __init__(self, kind: str, train: Rows, held_out: Rows, model: ModelSettings, counts: dict[str, int]) -> None:
        """Keep the rows; ``kind`` is ``text`` or ``instructions``."""
        self.kind, self.counts = kind, counts
        self._train, self._held_out, self._model = train, held_out, model
        self.cases = len(held_out)

    def load_model(self) -> PreTrainedModel:
        """A causal language model."""
        return load_language_model(self._model)

    def sft_rows(self) -> Rows:
        """The training rows."""
        return self._train

    def preference_rows(self, limit: int | None) -> tuple[Rows, Catalogue]:
        """None of these data has rejected answers."""
        raise UserError(
            f"data of kind {self.kind} has no rejected answers: a softmax_dpo stage needs interactions, sdpo,"
            " preferences or choices"
        )

    def baselines(self) -> dict[str, Callable[[], Measurement]]:
        """Nothing beside the base model."""
        return {}

    def evaluate(self, model: nn.Module) -> Measurement:
        """Cross-entropy of held-out answers, in nats per token, and its exponential."""
        return Measurement(self._measured(model, self._held_out))

    def evaluate_training(self, model: nn.Module, limit: int, seed: int) -> Metrics:
        """The same over training rows."""
        return self._measured(model, sample(self._train, limit, seed)[0])

    def _measured(self, model: nn.Module, rows: Rows) -> Metrics:
        found = answer_loss(model, rows)
        return {name: found[name] for name in self.columns}
