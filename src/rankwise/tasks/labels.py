"""Classification of one or two sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from sklearn.metrics import accuracy_score, f1_score
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase, Trainer

from rankwise.errors import UserError
from rankwise.models import load_classifier
from rankwise.tasks.task import Metrics
from rankwise.tokenise import padding_token

Rows = Sequence[Mapping[str, Any]]


class LabelTask:
    """A :class:`rankwise.tasks.task.Task` over labelled sentences, with the model's own classification head."""

    kind = "classification"
    task_type = "SEQ_CLS"
    columns: tuple[str, ...] = ("accuracy", "F1")

    def __init__(
        self,
        train: Rows,
        held_out: Rows,
        labels: list[str],
        tokenizer: PreTrainedTokenizerBase,
        model_path: str,
        context: int,
        counts: dict[str, int],
    ) -> None:
        """Tokenise both parts; sentences beyond the context are cut on the right, and counted."""
        self._labels, self._tokenizer, self._path = labels, tokenizer, model_path
        self._train, train_cut = _encode(train, tokenizer, context)
        self._held_out, held_out_cut = _encode(held_out, tokenizer, context)
        self.cases = len(self._held_out)
        cut = {
            "training rows cut to the context": train_cut,
            "held-out rows cut to the context": held_out_cut,
        }
        self.counts = {**counts, **{name: count for name, count in cut.items() if count}}
        self.trainer: Callable[..., Trainer] | None = partial(Trainer, data_collator=self._collator())
        self._truth = [row["labels"] for row in self._held_out]

    def load_model(self) -> PreTrainedModel:
        """The model with a new head."""
        return load_classifier(self._path, self._labels, padding_token(self._tokenizer))

    def sft_rows(self) -> Rows:
        """The training rows."""
        return self._train

    def preference_rows(self, limit: int | None) -> Rows:
        """Labels are no answers to prefer."""
        raise UserError("data of kind classification has no rejected answers: use an sft stage")

    def baselines(self) -> dict[str, Metrics]:
        """The most frequent label of the training part."""
        most = Counter(row["labels"] for row in self._train).most_common(1)[0][0]
        return {"most frequent": self._metrics([most] * self.cases)}

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> Metrics:
        """Accuracy, and F1 of the second label where there are two, else the mean F1 over labels."""
        was_training = model.training
        model.eval()
        device, found = next(model.parameters()).device, []
        for start in range(0, self.cases, 64):
            batch = self._collator()([dict(row) for row in self._held_out[start : start + 64]])
            batch.pop("labels")
            found += model(**{name: tensor.to(device) for name, tensor in batch.items()}).logits.argmax(-1).tolist()
        model.train(was_training)
        return self._metrics(found)

    def _metrics(self, found: Sequence[int]) -> Metrics:
        average = "binary" if len(self._labels) == 2 else "macro"
        f1 = f1_score(self._truth, found, average=average, zero_division=0)
        return {"accuracy": float(accuracy_score(self._truth, found)), "F1": float(f1)}

    def _collator(self) -> DataCollatorWithPadding:
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        return DataCollatorWithPadding(self._tokenizer)


def _encode(rows: Rows, tokenizer: PreTrainedTokenizerBase, context: int) -> tuple[list[dict[str, Any]], int]:
    """Token ids of one or two sentences with the tokenizer's own separators, and how many were cut."""
    encoded, cut = [], 0
    for row in rows:
        sentences = [row["sentence1"], *([row["sentence2"]] if "sentence2" in row else [])]
        whole = len(tokenizer(*sentences, verbose=False)["input_ids"])
        made = tokenizer(*sentences, truncation=True, max_length=context)
        cut += whole > context
        encoded.append({**made, "labels": row["label"]})
    return encoded, cut
