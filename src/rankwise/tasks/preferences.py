"""Preferences: prompts with a chosen answer and rejected ones, texts or chats, from a file to their ranking."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankwise.checkpoints import CheckpointedTrainer
from rankwise.counting import count
from rankwise.errors import UserError
from rankwise.likelihood import evaluating
from rankwise.methods import base_of
from rankwise.models import load_language_model
from rankwise.preferences.negatives import Catalogue
from rankwise.preferences.rows import PreferenceRow, encode_preferences
from rankwise.recommend.metrics import Scores
from rankwise.recommend.ranking import EncodedCase, score_candidates
from rankwise.recommend.store import Store
from rankwise.sampling import sample
from rankwise.schema import ModelSettings
from rankwise.tasks.tables import read_rows, require_columns
from rankwise.tasks.task import Measurement, Metrics
from rankwise.tokenise import IGNORED, padding_token

Rows = Sequence[Mapping[str, Any]]
COLUMNS = ("prompt", "chosen", "rejected")
NO_PROMPT = "rows without a prompt"
NO_CHOSEN = "rows without a chosen answer"
NO_REJECTED = "rows without a rejected answer that differs from the chosen one"


def read_preferences(path: Path) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Read rows of ``prompt``, ``chosen`` and ``rejected``, by TRL's conventions.

    Answers are texts or lists of chat messages; ``rejected`` is one answer or a list of any number. Chats may go
    without a prompt, where the answers are whole conversations. Rows without what they need are dropped and counted.

    Args:
        path: a table (see :func:`rankwise.tasks.tables.read_rows`).

    Returns:
        The rows with their three columns, and ``seen`` (answers that are never rejected ones) where a row has it; and
        what was dropped.

    Raises:
        UserError: the file cannot be read, a column is missing, or no row is usable.
    """
    rows, counts = read_rows(path)
    require_columns(path, rows, COLUMNS[1:])
    kept = []
    for row in rows:
        if missing := _missing(row):
            count(counts, missing)
        else:
            kept.append({name: row[name] for name in (*COLUMNS, "seen") if row.get(name)})
    if not kept:
        raise UserError(f"{path} holds no row with a prompt, a chosen answer and a rejected one ({counts})")
    return kept, counts


def _missing(row: Mapping[str, Any]) -> str | None:
    """What a row lacks, if anything."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if not chosen:
        return NO_CHOSEN
    if isinstance(chosen, str) and not row.get("prompt"):
        return NO_PROMPT
    listed = rejected if isinstance(rejected, list) else [rejected]
    if not any(answer and answer != chosen for answer in listed) or rejected == chosen:
        return NO_REJECTED
    return None


class PreferenceTask:
    """A :class:`rankwise.tasks.task.Task` over rows of a prompt with its answers.

    Attributes:
        columns: ``accuracy``, the share of rows whose chosen answer is more probable than every rejected one;
            ``accuracy per token``, the same by the mean log-probability of an answer's tokens; ``loss``, the mean
            negative log-probability of the chosen answers' tokens, in nats; and ``reward accuracy``, the share of rows
            whose chosen answer has gained more over the base, log p(answer) - log p_base(answer), than every rejected
            one, which an adapter has and the base has not.
    """

    kind = "preferences"
    task_type = "CAUSAL_LM"
    labels: list[str] = []  # noqa: RUF012 - none, and never changed
    columns: tuple[str, ...] = ("reward accuracy", "accuracy", "accuracy per token", "loss")
    trainer: Callable[..., CheckpointedTrainer] | None = None
    store: Store | None = None

    def __init__(
        self,
        train: Rows,
        held_out: Rows,
        tokenizer: PreTrainedTokenizerBase,
        model: ModelSettings,
        context: int,
        counts: dict[str, int],
        seed: int,
    ) -> None:
        """Tokenise all rows, so that a mistake is found before anything is trained."""
        self._train, self._tokenizer, self._model, self._seed = train, tokenizer, model, seed
        self._rows, found = _encoded("training", train, tokenizer, context)
        self._held_out, more = _encoded("held-out", held_out, tokenizer, context)
        self.counts = counts | found | more
        self.cases = len(held_out)
        self._of_base: dict[int, Scores] = {}

    def load_model(self) -> PreTrainedModel:
        """A causal language model."""
        return load_language_model(self._model)

    def sft_rows(self) -> Rows:
        """Prompts with their chosen answers, as preference training joins them."""
        return [
            {"input_ids": row.prompt + row.answers[0], "labels": [IGNORED] * len(row.prompt) + row.answers[0]}
            for row in self._rows
        ]

    def preference_rows(self, limit: int | None) -> tuple[Rows, Catalogue | None]:
        """The rows as they were read, whose rejected answers are their candidates too; there is no catalogue."""
        return [{**row, "candidates": row["rejected"]} for row in sample(self._train, limit, self._seed)[0]], None

    def baselines(self) -> dict[str, Callable[[], Measurement]]:
        """Nothing beside the base model."""
        return {}

    def evaluate(self, model: nn.Module) -> Measurement:
        """Rank the answers of every held-out row."""
        return Measurement(self._measured(model, self._held_out))

    def evaluate_training(self, model: nn.Module, limit: int, seed: int) -> Metrics:
        """The same over training rows."""
        return self._measured(model, sample(self._rows, limit, seed)[0])

    def _measured(self, model: nn.Module, rows: Sequence[PreferenceRow]) -> Metrics:
        scores = self._scores(model, rows)
        found = {"accuracy": _accuracy(scores)}
        means = [values / list(map(len, row.answers)) for row, values in zip(rows, scores, strict=True)]
        found["accuracy per token"] = _accuracy(means)
        nats = -sum(float(values[0]) for values in scores)
        found["loss"] = nats / sum(len(row.answers[0]) for row in rows)
        base = self._base_scores(model, rows) if isinstance(model, PeftModel) else scores
        rewards = [values - before for values, before in zip(scores, base, strict=True)]
        if any(reward.any() for reward in rewards):
            found["reward accuracy"] = _accuracy(rewards)
        return {name: found[name] for name in self.columns if name in found}

    def _scores(self, model: nn.Module, rows: Sequence[PreferenceRow]) -> list[Scores]:
        """Log-probabilities of each row's answers, chosen first."""
        cases = [EncodedCase(row.prompt, row.answers) for row in rows]
        with evaluating(model):
            return score_candidates(model, cases, padding_token(self._tokenizer))

    def _base_scores(self, model: PeftModel, rows: Sequence[PreferenceRow]) -> list[Scores]:
        """The same of the base, which never changes: computed once for a row."""
        if new := [row for row in rows if id(row) not in self._of_base]:
            with base_of(model):
                self._of_base |= dict(zip(map(id, new), self._scores(model, new), strict=True))
        return [self._of_base[id(row)] for row in rows]


def _accuracy(scores: Sequence[Scores]) -> float:
    """Share of rows whose first score is above all others; NaN where one is."""
    if any(np.isnan(values).any() for values in scores):
        return math.nan
    return sum(bool((values[0] > values[1:]).all()) for values in scores) / len(scores)


def _encoded(
    part: str, rows: Rows, tokenizer: PreTrainedTokenizerBase, context: int
) -> tuple[list[PreferenceRow], dict[str, int]]:
    """Rows as token ids; mistakes and counts name the part that they are in."""
    try:
        encoded, counts = encode_preferences(rows, tokenizer, context)
    except UserError as mistake:
        raise UserError(f"{part} {mistake}") from None
    return encoded, {f"{part} {name}": number for name, number in counts.items()}
