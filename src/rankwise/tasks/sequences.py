"""Texts and what they become, for encoder-decoder models: summaries and translations."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase

from rankwise.checkpoints import CheckpointedTrainer
from rankwise.counting import count
from rankwise.errors import UserError
from rankwise.likelihood import evaluating
from rankwise.models import load_sequence_model
from rankwise.preferences.negatives import Catalogue
from rankwise.recommend.store import Store
from rankwise.sampling import sample
from rankwise.schema import ModelSettings
from rankwise.tasks.labels import LabelTrainer
from rankwise.tasks.rouge import rouge
from rankwise.tasks.tables import as_text, read_rows, require_columns
from rankwise.tasks.task import Measurement, Metrics
from rankwise.tokenise import end_token

Rows = Sequence[Mapping[str, Any]]
UNUSABLE = "rows without a source or a target"
BATCH = 32
SCORED_BY_SACREBLEU = ("BLEU", "chrF")


def read_sequences(path: Path, source: str, target: str, prefix: str) -> tuple[list[dict[str, str]], dict[str, int]]:
    """Read pairs of texts; those that lack one are dropped and counted.

    Args:
        path: a table (see :func:`rankwise.tasks.tables.read_rows`).
        source: column of the text that is read.
        target: column of the text that is written.
        prefix: stands before each source (T5's "summarize: ", say).

    Raises:
        UserError: the file cannot be read, lacks a column, or no row has both.
    """
    rows, counts = read_rows(path)
    require_columns(path, rows, [source, target])
    pairs = [(as_text(row.get(source)), as_text(row.get(target))) for row in rows]
    kept = [{"source": prefix + one, "target": other} for one, other in pairs if one and other]
    count(counts, UNUSABLE, len(pairs) - len(kept))
    if not kept:
        raise UserError(f"{path} holds no row with both {source} and {target}")
    return kept, counts


class SequenceTask:
    """A :class:`rankwise.tasks.task.Task` over pairs of texts: what the model writes, and the loss of the targets."""

    kind = "sequences"
    task_type = "SEQ_2_SEQ_LM"
    labels: list[str] = []  # noqa: RUF012 - none, and never changed
    store: Store | None = None

    def __init__(
        self,
        train: Sequence[Mapping[str, str]],
        held_out: Sequence[Mapping[str, str]],
        tokenizer: PreTrainedTokenizerBase,
        model: ModelSettings,
        context: int,
        counts: dict[str, int],
        measures: Sequence[str],
        tokens: int,
    ) -> None:
        """Tokenise both parts; texts beyond their length are cut on the right, and counted.

        Args:
            train: rows of ``source`` and ``target``.
            held_out: rows to measure on.
            tokenizer: the model's.
            model: where the model is.
            context: most tokens of a source.
            counts: of what was read and dropped.
            measures: of what is written: ROUGE-1, ROUGE-2, ROUGE-L, BLEU, chrF.
            tokens: most of a target, and of what is written.

        Raises:
            UserError: sacrebleu, which counts BLEU and chrF, is wanted and not installed.
        """
        if set(measures) & set(SCORED_BY_SACREBLEU) and importlib.util.find_spec("sacrebleu") is None:
            raise UserError(f"data.measures {', '.join(measures)} need sacrebleu: pip install 'rankwise[sequences]'")
        self._tokenizer, self._model, self._measures, self._tokens = tokenizer, model, tuple(measures), tokens
        self.counts = dict(counts)
        self._train = _encode(train, tokenizer, context, tokens, "training", self.counts)
        self._held_out = _encode(held_out, tokenizer, context, tokens, "held-out", self.counts)
        self.columns = (*self._measures, "loss", "perplexity")
        self.cases = len(self._held_out)
        self._collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
        self.trainer: Callable[..., CheckpointedTrainer] | None = partial(
            LabelTrainer, data_collator=self._without_texts
        )

    def load_model(self) -> PreTrainedModel:
        """An encoder-decoder model."""
        return load_sequence_model(self._model)

    def sft_rows(self) -> Rows:
        """The training rows."""
        return self._train

    def preference_rows(self, limit: int | None) -> tuple[Rows, Catalogue]:
        """None of these data has rejected answers."""
        raise UserError("data of kind sequences has no rejected answers: use an sft stage")

    def baselines(self) -> dict[str, Callable[[], Measurement]]:
        """Nothing beside the base model."""
        return {}

    def evaluate(self, model: nn.Module) -> Measurement:
        """Means over held-out rows; the loss over their target tokens, in nats."""
        return Measurement(self._measured(model, self._held_out))

    def evaluate_training(self, model: nn.Module, limit: int, seed: int) -> Metrics:
        """The same over training rows."""
        return self._measured(model, sample(self._train, limit, seed)[0])

    @torch.no_grad()
    def _measured(self, model: nn.Module, rows: Rows) -> Metrics:
        device, texts, total, tokens = next(model.parameters()).device, list[str](), 0.0, 0
        with evaluating(model):
            for start in range(0, len(rows), BATCH):
                batch = self._without_texts(rows[start : start + BATCH])
                given = {name: batch[name].to(device) for name in ("input_ids", "attention_mask", "labels")}
                logits = model(**given).logits
                losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), given["labels"].flatten())
                number = int((given["labels"] != -100).sum())
                total, tokens = total + float(losses) * number, tokens + number
                del given["labels"]
                written = model.generate(  # type: ignore[operator]
                    **given, max_new_tokens=self._tokens, num_beams=1, do_sample=False
                )
                texts += self._tokenizer.batch_decode(written, skip_special_tokens=True)
        loss = total / tokens
        found = self._scores([text.strip() for text in texts], [row["target"] for row in rows])
        return found | {"loss": loss, "perplexity": float(torch.tensor(loss, dtype=torch.float64).exp())}

    def _scores(self, written: Sequence[str], references: Sequence[str]) -> Metrics:
        each = [rouge(one, other) for one, other in zip(written, references, strict=True)]
        found = {name: sum(row[name] for row in each) / len(each) for name in each[0]}
        if set(self._measures) & set(SCORED_BY_SACREBLEU):
            from sacrebleu import corpus_bleu, corpus_chrf

            found["BLEU"] = corpus_bleu(list(written), [list(references)]).score / 100
            found["chrF"] = corpus_chrf(list(written), [list(references)]).score / 100
        return {name: found[name] for name in self._measures}

    def _without_texts(self, rows: Rows) -> Any:
        """A batch of the rows' numbers."""
        return self._collator([{name: row[name] for name in ("input_ids", "attention_mask", "labels")} for row in rows])


def _encode(
    rows: Sequence[Mapping[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    tokens: int,
    part: str,
    counts: dict[str, int],
) -> list[dict[str, Any]]:
    """Token ids of both texts, the target's closed by the end-of-text token, and the target as text."""
    sources, targets = [row["source"] for row in rows], [row["target"] for row in rows]
    whole = tokenizer(sources, verbose=False)["input_ids"]
    inputs = tokenizer(sources, truncation=True, max_length=context)
    closed = [_closed(ids, end_token(tokenizer)) for ids in tokenizer(text_target=targets, verbose=False)["input_ids"]]
    count(counts, f"{part} sources cut to the context", sum(len(ids) > context for ids in whole))
    count(counts, f"{part} targets cut to {tokens} tokens", sum(len(ids) > tokens for ids in closed))
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": label[:tokens], "target": target}
        for ids, mask, label, target in zip(inputs["input_ids"], inputs["attention_mask"], closed, targets, strict=True)
    ]


def _closed(ids: list[int], end: int) -> list[int]:
    return ids if ids and ids[-1] == end else [*ids, end]
