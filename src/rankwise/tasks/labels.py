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
from rankwise.preferences.negatives import Catalogue
from rankwise.recommend.store import Store
from rankwise.sampling import sample
from rankwise.schema import ModelSettings
from rankwise.tasks.task import Measurement, Metrics
from rankwise.tokenise import padding_token

Rows = Sequence[Mapping[str, Any]]


class LabelTrainer(Trainer):
    """``transformers.Trainer`` for a model whose loss is the mean over a batch's rows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The model's forward swallows any keyword, so the trainer would believe that the loss is already divided by the
        # rows of all accumulated batches, and not divide it.
        self.model_accepts_loss_kwargs = False


class LabelTask:
    """A :class:`rankwise.tasks.task.Task` over labelled sentences, with the model's own classification head."""

    kind = "classification"
    task_type = "SEQ_CLS"
    columns: tuple[str, ...] = ("accuracy", "F1")
    store: Store | None = None

    def __init__(
        self,
        train: Rows,
        held_out: Rows,
        labels: list[str],
        tokenizer: PreTrainedTokenizerBase,
        model: ModelSettings,
        context: int,
        counts: dict[str, int],
    ) -> None:
        """Tokenise both parts; sentences beyond the context are cut on the right, and counted."""
        self.labels, self._tokenizer, self._model = labels, tokenizer, model
        self._train, train_cut = _encode(train, tokenizer, context)
        self._held_out, held_out_cut = _encode(held_out, tokenizer, context)
        self.cases = len(self._held_out)
        cut = {
            "training rows cut to the context": train_cut,
            "held-out rows cut to the context": held_out_cut,
        }
        self.counts = {**counts, **{name: count for name, count in cut.items() if count}}
        self.trainer: Callable[..., Trainer] | None = partial(LabelTrainer, data_collator=self._collator())

    def load_model(self) -> PreTrainedModel:
        """The model with a new head."""
        return load_classifier(self._model, self.labels, padding_token(self._tokenizer))

    def sft_rows(self) -> Rows:
        """The training rows."""
        return self._train

    def preference_rows(self, limit: int | None) -> tuple[Rows, Catalogue]:
        """Labels are no answers to prefer."""
        raise UserError("data of kind classification has no rejected answers: use an sft stage")

    def baselines(self) -> dict[str, Callable[[], Measurement]]:
        """The most frequent label of the training part."""
        return {"most frequent": self._most_frequent}

    def _most_frequent(self) -> Measurement:
        most = Counter(row["labels"] for row in self._train).most_common(1)[0][0]
        return Measurement(self._metrics(self._held_out, [most] * self.cases))

    def evaluate(self, model: nn.Module) -> Measurement:
        """Accuracy, and F1 of the second label where there are two, else the mean F1 over labels."""
        return Measurement(self._measured(model, self._held_out))

    def evaluate_training(self, model: nn.Module, limit: int, seed: int) -> Metrics:
        """The same over training rows."""
        return self._measured(model, sample(self._train, limit, seed)[0])

    @torch.no_grad()
    def _measured(self, model: nn.Module, rows: Rows) -> Metrics:
        was_training = model.training
        model.eval()
        device, found = next(model.parameters()).device, []
        for start in range(0, len(rows), 64):
            batch = self._collator()([dict(row) for row in rows[start : start + 64]])
            batch.pop("labels")
            found += model(**{name: tensor.to(device) for name, tensor in batch.items()}).logits.argmax(-1).tolist()
        model.train(was_training)
        return self._metrics(rows, found)

    def _metrics(self, rows: Rows, found: Sequence[int]) -> Metrics:
        truth, average = [row["labels"] for row in rows], "binary" if len(self.labels) == 2 else "macro"
        f1 = f1_score(truth, found, average=average, zero_division=0)
        return {"accuracy": float(accuracy_score(truth, found)), "F1": float(f1)}

    def _collator(self) -> DataCollatorWithPadding:
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        return DataCollatorWithPadding(self._tokenizer)


def _encode(rows: Rows, tokenizer: PreTrainedTokenizerBase, context: int) -> tuple[list[dict[str, Any]], int]:
    """Token ids of one or two sentences, and how many rows were cut.

    Two sentences are joined as the tokenizer joins a pair; where it would only write one after the other (GPT-2,
    Llama), its end-of-text token stands between them.
    """
    texts = [[row["sentence1"], *([row["sentence2"]] if "sentence2" in row else [])] for row in rows]
    if texts and len(texts[0]) == 2 and not _separates(tokenizer):
        texts = [[str(tokenizer.eos_token or "\n").join(pair)] for pair in texts]
    columns = list(zip(*texts, strict=True))
    whole = tokenizer(*map(list, columns), verbose=False)["input_ids"]
    cut = tokenizer(*map(list, columns), truncation=True, max_length=context)
    made = [dict(zip(cut, values, strict=True)) for values in zip(*cut.values(), strict=True)]
    encoded = [{**row, "labels": source["label"]} for row, source in zip(made, rows, strict=True)]
    return encoded, sum(len(ids) > context for ids in whole)


def _separates(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts anything between the two sentences of a pair."""
    pair = tokenizer("a", "b")["input_ids"]
    alone = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "b")]
    joined = alone[0] + alone[1]
    return not any(pair[start : start + len(joined)] == joined for start in range(len(pair)))
