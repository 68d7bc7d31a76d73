"""Recommendation: prompts with a history, the true next item, and candidates to rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from rankwise.errors import UserError
from rankwise.models import load_language_model
from rankwise.preferences.negatives import Catalogue
from rankwise.recommend.baselines import popularity_scores, random_scores, target_places
from rankwise.recommend.metrics import ranking_metrics, substring_protocol
from rankwise.recommend.prepare import Prepared
from rankwise.recommend.prompts import Template
from rankwise.recommend.ranking import encode_cases, generate_answers, score_candidates
from rankwise.recommend.store import Store, make_store
from rankwise.sampling import sample
from rankwise.schema import ModelSettings
from rankwise.tasks.task import Metrics
from rankwise.tokenise import encode_answers, padding_token

PROTOCOL = ("HR@1 greedy", "HR@1 greedy of valid", "valid ratio")


class RecommendationTask:
    """A :class:`rankwise.tasks.task.Task` over prepared rows."""

    kind = "recommend"
    task_type = "CAUSAL_LM"
    labels: list[str] = []  # noqa: RUF012 - none, and never changed
    trainer: Callable[..., Trainer] | None = None

    def __init__(
        self,
        prepared: Prepared,
        template: Template,
        tokenizer: PreTrainedTokenizerBase,
        model: ModelSettings,
        context: int,
        *,
        split: str = "test",
        cases: int | None = None,
        generate: bool = True,
        seed: int = 0,
    ) -> None:
        """Choose the evaluation cases and tokenise the training rows."""
        self._prepared, self._tokenizer, self._model = prepared, tokenizer, model
        self._seed, self._generate, self._template = seed, generate, template
        self._seen: dict[frozenset[str], frozenset[str]] = {}
        self.store: Store | None = make_store(prepared, template)
        self._evaluation, left_out = sample(getattr(prepared, split), cases, seed)
        if not self._evaluation:
            raise UserError(f"the {split} part has no case to evaluate on")
        self.columns: tuple[str, ...] = ("HR@1", "HR@5", "NDCG@5", "MRR", *(PROTOCOL if generate else ()))
        self.cases = len(self._evaluation)
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in prepared.train]
        self._rows, cut = encode_answers(rows, tokenizer, context)
        self.counts = {**prepared.counts, **{f"training {name}": number for name, number in cut.items()}}
        prompts = [row["prompt"] for row in self._evaluation]
        answers = [[template.render_answer(title) for title in row["candidates"]] for row in self._evaluation]
        self._cases, prompts_cut = encode_cases(tokenizer, prompts, answers, context)
        self.counts |= {"evaluation cases left out": left_out, "evaluation prompts cut to the context": prompts_cut}

    def load_model(self) -> PreTrainedModel:
        """A causal language model."""
        return load_language_model(self._model)

    def sft_rows(self) -> Sequence[Mapping[str, Any]]:
        """Prompts with the true next item as the answer."""
        return self._rows

    def preference_rows(self, limit: int | None) -> tuple[Sequence[Mapping[str, Any]], Catalogue]:
        """Training rows with their rejected items, which are their candidates too, and all titles by popularity."""
        rows = [
            {**row, "candidates": row["rejected"], "seen": self._rendered(row["seen"])}
            for row in sample(self._prepared.train, limit, self._seed)[0]
        ]
        titles = self._prepared.catalogue
        answers = [self._template.render_answer(title) for title in titles]
        return rows, Catalogue(answers, [self._prepared.popularity.get(title, 0) for title in titles])

    def _rendered(self, titles: frozenset[str]) -> frozenset[str]:
        """As answers; the rows of a user share one set of titles."""
        if titles not in self._seen:
            self._seen[titles] = frozenset(map(self._template.render_answer, titles))
        return self._seen[titles]

    def baselines(self) -> dict[str, Metrics]:
        """Chance, and what is most popular in training."""
        candidates, targets = self._candidates()
        scores = {
            "random": random_scores(candidates),
            "popularity": popularity_scores(candidates, self._prepared.popularity),
        }
        places = target_places(candidates, targets)
        return {name: ranking_metrics(values, places) for name, values in scores.items()}

    def evaluate(self, model: nn.Module) -> Metrics:
        """Rank every case's candidates, and run the papers' protocol where it is wanted."""
        was_training = model.training
        model.eval()
        candidates, targets = self._candidates()
        scores = score_candidates(model, self._cases, padding_token(self._tokenizer))
        metrics = ranking_metrics(scores, target_places(candidates, targets))
        if self._generate:
            texts = generate_answers(model, self._tokenizer, self._cases)
            found = substring_protocol(texts, candidates, targets)
            values = (found.hit_rate, found.hit_rate_valid, found.valid_ratio)
            metrics |= dict(zip(PROTOCOL, values, strict=True))
        model.train(was_training)
        return metrics

    def evaluate_training(self, model: nn.Module, limit: int, seed: int) -> Metrics:
        """Training rows have few rejected items, no list of candidates, so their metrics would not compare."""
        raise UserError("recommendation has no measure over its training rows: leave evaluation.training_cases out")

    def _candidates(self) -> tuple[list[list[str]], list[str]]:
        return [row["candidates"] for row in self._evaluation], [row["target"] for row in self._evaluation]
