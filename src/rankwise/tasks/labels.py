"""Labels or values of one or two sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from rankwise.checkpoints import CheckpointedTrainer
from rankwise.errors import UserError
from rankwise.likelihood import evaluating
from rankwise.models import load_classifier
from rankwise.preferences.negatives import Catalogue
from rankwise.recommend.store import Store
from rankwise.sampling import sample
from rankwise.schema import ModelSettings
from rankwise.tasks.label_scores import LabelMetric, check_truth, label_scores
from rankwise.tasks.task import Measurement, Metrics
from rankwise.tokenise import padding_token

Rows = Sequence[Mapping[str, Any]]


class LabelTrainer(CheckpointedTrainer):
    """``transformers.Trainer`` for a model whose loss is the mean over a batch's rows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The model's forward swallows any keyword, so the trainer would believe that the loss is already divided by the
        # rows of all accumulated batches, and not divide it.
        self.model_accepts_loss_kwargs = False


class LabelTask:
    """A :class:`rankwise.tasks.task.Task` over labelled sentences, with the model's own classification head.

    A single label stands for values, which the head's one output learns by squared error.
    """

    kind = "classification"
    task_type = "SEQ_CLS"
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
        metrics: Sequence[LabelMetric] = ("accuracy", "F1"),
        others: Mapping[str, Rows] | None = None,
    ) -> None:
        """Tokenise all parts; sentences beyond the context are cut on the right, and counted.

        Args:
            train: rows of ``sentence1``, ``sentence2`` where there are two, and ``label``, a number.
            held_out: rows to measure on.
            labels: their names.
            tokenizer: the model's.
            model: where the model is.
            context: most tokens of a row.
            counts: of what was read and dropped.
            metrics: what is measured.
            others: more parts to measure on, each by the name that follows its metrics' own.

        Raises:
            UserError: a part has no row, or one label alone where a correlation is measured.
        """
        for rows in (held_out, *(others or {}).values()):
            check_truth(metrics, np.array([row["label"] for row in rows]))
        self.labels, self._tokenizer, self._model, self._names = labels, tokenizer, model, tuple(metrics)
        self._train, train_cut = _encode(train, tokenizer, context)
        self._held_out, held_out_cut = _encode(held_out, tokenizer, context)
        encoded = {name: _encode(rows, tokenizer, context) for name, rows in (others or {}).items()}
        self._others = {name: rows for name, (rows, _) in encoded.items()}
        self.columns = (*metrics, *(f"{metric} {name}" for name in self._others for metric in metrics))
        self.cases = len(self._held_out)
        cut = {
            "training rows cut to the context": train_cut,
            "held-out rows cut to the context": held_out_cut,
            **{f"{name} rows cut to the context": number for name, (_, number) in encoded.items()},
        }
        self.counts = {**counts, **{name: count for name, count in cut.items() if count}}
        self.trainer: Callable[..., CheckpointedTrainer] | None = partial(LabelTrainer, data_collator=self._collator())

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
        """The most frequent label of the training part; nothing for values."""
        return {"most frequent": self._most_frequent} if len(self.labels) > 1 else {}

    def _most_frequent(self) -> Measurement:
        most = Counter(row["labels"] for row in self._train).most_common(1)[0][0]
        outputs = np.eye(len(self.labels))[most]
        return Measurement(self._everywhere(lambda rows: np.tile(outputs, (len(rows), 1))))

    def evaluate(self, model: nn.Module) -> Measurement:
        """Each metric of the held-out rows, and of the other parts."""
        return Measurement(self._everywhere(lambda rows: self._outputs(model, rows)))

    def evaluate_training(self, model: nn.Module, limit: int, seed: int) -> Metrics:
        """The metrics over training rows."""
        rows = sample(self._train, limit, seed)[0]
        return self._scores(rows, self._outputs(model, rows))

    def _everywhere(self, outputs: Callable[[Rows], np.ndarray]) -> Metrics:
        found = self._scores(self._held_out, outputs(self._held_out))
        for name, rows in self._others.items():
            found |= {f"{metric} {name}": value for metric, value in self._scores(rows, outputs(rows)).items()}
        return found

    def _scores(self, rows: Rows, outputs: np.ndarray) -> Metrics:
        return label_scores(self._names, outputs, np.array([row["labels"] for row in rows]))

    @torch.no_grad()
    def _outputs(self, model: nn.Module, rows: Rows) -> np.ndarray:
        """The head's outputs, (rows, labels); rows of like length go through the model together."""
        device, found = next(model.parameters()).device, []
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]["input_ids"]))
        with evaluating(model):
            for start in range(0, len(rows), 64):
                batch = self._collator()([dict(rows[index]) for index in order[start : start + 64]])
                batch.pop("labels")
                found.append(model(**{name: tensor.to(device) for name, tensor in batch.items()}).logits.float().cpu())
        return torch.cat(found)[torch.tensor(order).argsort()].numpy()

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
