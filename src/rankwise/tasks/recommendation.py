"""Recommendation: prompts with a history, the true next item, and candidates to rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import polars as pl
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankwise.checkpoints import CheckpointedTrainer
from rankwise.errors import UserError
from rankwise.generation import generate_answers
from rankwise.likelihood import evaluating
from rankwise.models import load_language_model
from rankwise.preferences.negatives import Catalogue
from rankwise.recommend.baselines.simple import popularity_scores, target_places
from rankwise.recommend.baselines.trained import TrainedBaseline, check_baselines
from rankwise.recommend.baselines.windows import Window
from rankwise.recommend.cases import means, ranked_cases
from rankwise.recommend.full_ranking import CASES, LISTS, full_ranking
from rankwise.recommend.metrics import Scores, substring_protocol
from rankwise.recommend.prompts import Template
from rankwise.recommend.ranking import GENERATED, encode_cases, score_candidates
from rankwise.recommend.recommender import count_alike
from rankwise.recommend.rows import Prepared
from rankwise.recommend.store import Store, make_store
from rankwise.sampling import sample
from rankwise.schema import ModelSettings
from rankwise.tasks.splits import hold_out
from rankwise.tasks.task import Measurement, Metrics
from rankwise.tokenise import IGNORED, answer_ids, encode_answers, padding_token
from rankwise.trees.catalogue import catalogue_scores
from rankwise.trees.search import NOT_A_NUMBER
from rankwise.trees.trie import CatalogueTrie

COUNTED = ("random", "popularity")  # baselines that are the same in every case
SCORED = 256  # cases whose scores of all titles are in memory at once
PROTOCOL = ("HR@1 greedy", "HR@1 greedy of valid", "valid ratio")


class RecommendationTask:
    """A :class:`rankwise.tasks.task.Task` over prepared rows."""

    kind = "recommend"
    task_type = "CAUSAL_LM"
    labels: list[str] = []  # noqa: RUF012 - none, and never changed
    trainer: Callable[..., CheckpointedTrainer] | None = None

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
        catalogue_cases: int | None = None,
        baselines: Sequence[str] = ("random", "popularity"),
        generate: bool = True,
        seed: int = 0,
    ) -> None:
        """Choose the evaluation cases and tokenise the training rows."""
        check_baselines(name for name in baselines if name not in COUNTED)
        if catalogue_cases and template.shows_candidates:
            raise UserError(
                f"evaluation.catalogue_cases is {catalogue_cases}, but the prompts of template {template.name!r} tell "
                "the candidates: take a template without {candidates}"
            )
        self._prepared, self._tokenizer, self._model = prepared, tokenizer, model
        self._padding, self._baselines = padding_token(tokenizer), baselines
        self._split = split
        self._seed, self._generate, self._template = seed, generate, template
        self._seen: dict[frozenset[str], frozenset[str]] = {}
        store = make_store(prepared, template)
        self.store: Store | None = store
        self._titles, self._too_long = _fitting(store.titles["title"].to_list(), template, tokenizer, context)
        held_out = getattr(prepared, split)
        possible = [row for row in held_out if self._too_long.isdisjoint(row["candidates"])]
        self._evaluation, left_out = sample(possible, cases, seed)
        if not self._evaluation:
            why = f" without a title that takes more than half of {context} tokens" if held_out else ""
            raise UserError(f"the {split} part has no case to evaluate on{why}")
        every = range(len(self._evaluation))
        self._full = sample(every, catalogue_cases, seed)[0] if catalogue_cases else []
        self.columns: tuple[str, ...] = (
            *("HR@1", "HR@5", "NDCG@5", "MRR"),
            *((*CASES, *LISTS) if self._full else ()),
            *(PROTOCOL if generate else ()),
        )
        self.cases = len(self._evaluation)
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in prepared.train]
        self._rows, cut = encode_answers(rows, tokenizer, context)
        self.counts = {
            **prepared.counts,
            **prepared.leaks,
            **{f"training {name}": number for name, number in cut.items()},
        }
        prompts = [row["prompt"] for row in self._evaluation]
        answers = [[template.render_answer(title) for title in row["candidates"]] for row in self._evaluation]
        room = self._trie.longest if self._full else 0
        self._cases, prompts_cut = encode_cases(tokenizer, prompts, answers, context, room)
        self.counts |= {"evaluation cases left out": left_out, "evaluation prompts cut to the context": prompts_cut}
        self.counts["titles left out as too long"] = len(self._too_long)
        self.counts["evaluation cases left out for such titles"] = len(held_out) - len(possible)
        self.counts |= _lengths(self._rows, self._answers) | count_alike(self._answers)

    @cached_property
    def _answers(self) -> list[list[int]]:
        """Token ids of all titles as answers."""
        return answer_ids(self._tokenizer, [self._template.render_answer(one) for one in self._titles])

    @cached_property
    def _trie(self) -> CatalogueTrie:
        """All titles as answers."""
        return CatalogueTrie(self._answers)

    def load_model(self) -> PreTrainedModel:
        """A causal language model."""
        return load_language_model(self._model)

    def sft_rows(self) -> Sequence[Mapping[str, Any]]:
        """Prompts with the true next item as the answer."""
        return self._rows

    def preference_rows(self, limit: int | None) -> tuple[Sequence[Mapping[str, Any]], Catalogue]:
        """Training rows with their rejected items, which are their candidates too, and the titles to draw more from."""
        rows = [
            {**row, "candidates": row["rejected"], "seen": self._rendered(row["seen"])}
            for row in sample(self._prepared.train, limit, self._seed)[0]
        ]
        titles = self._prepared.pool
        answers = [self._template.render_answer(title) for title in titles]
        return rows, Catalogue(answers, [self._prepared.popularity.get(title, 0) for title in titles])

    def _rendered(self, titles: frozenset[str]) -> frozenset[str]:
        """As answers; the rows of a user share one set of titles."""
        if titles not in self._seen:
            self._seen[titles] = frozenset(map(self._template.render_answer, titles))
        return self._seen[titles]

    def baselines(self) -> dict[str, Callable[[], Measurement]]:
        """What the recipe wants to compare with; fitted to the training rows where it is called."""
        return {name: partial(self._baseline, name) for name in self._baselines}

    def _baseline(self, name: str) -> Measurement:
        scored, places = self._fitted(name), {title: place for place, title in enumerate(self._titles)}
        candidates, _ = self._candidates()
        scores = scored(range(self.cases))
        picked = [row[[places[title] for title in candidates[case]]] for case, row in scores]
        return self._measured(picked, ((at, row) for at, (_, row) in enumerate(scored(self._full))))

    def _fitted(self, name: str) -> Callable[[Sequence[int]], Iterator[tuple[int, Scores]]]:
        """A function that goes through some cases and the scores of all titles in each."""
        if name in COUNTED:
            counts = {} if name == "random" else self._prepared.popularity
            [scores] = popularity_scores([self._titles], counts)
            return lambda cases: ((case, scores) for case in cases)
        rows = self._prepared.train, self._prepared.validation
        train, held_out = ([self._window(row) for row in part if row["target"] not in self._too_long] for part in rows)
        if self._split != "test":  # what is measured must not say when to stop
            train, held_out = hold_out(train, 0.1, self._seed)
        baseline = TrainedBaseline(name, self._titles, self._seed).fit(train, held_out)

        def scored(cases: Sequence[int]) -> Iterator[tuple[int, Scores]]:
            for start in range(0, len(cases), SCORED):
                part = cases[start : start + SCORED]
                yield from zip(
                    part, baseline.scores([self._window(self._evaluation[case]).history for case in part]), strict=True
                )

        return scored

    def _window(self, row: Mapping[str, Any]) -> Window:
        return Window(row["user"], [title for title in row["history"] if title not in self._too_long], row["target"])

    def evaluate(self, model: nn.Module) -> Measurement:
        """Rank every case's candidates, and the catalogue and the papers' protocol where they are wanted."""
        with evaluating(model):
            scores = score_candidates(model, self._cases, self._padding)
            if any(np.isnan(one).any() for one in scores):
                raise UserError(NOT_A_NUMBER)
            found = self._measured(scores, self._full_scores(model))
            return self._with_protocol(model, found) if self._generate else found

    def _measured(self, scores: Sequence[Scores], full: Iterable[tuple[int, Scores]]) -> Measurement:
        """Of scores of each case's candidates, and of all titles in the cases that rank them."""
        candidates, targets = self._candidates()
        popularity = self._prepared.popularity
        users = [str(row["user"]) for row in self._evaluation]
        chosen = [len(row["seen"]) for row in self._evaluation]
        cases = ranked_cases(users, targets, scores, target_places(candidates, targets), popularity, chosen=chosen)
        metrics = means(cases)
        if self._full:
            more, columns = full_ranking([self._evaluation[at] for at in self._full], self._titles, popularity, full)
            metrics |= more
            some = columns.with_columns(pl.Series("case", self._full, dtype=pl.UInt32))
            every = cases.with_row_index("case")
            cases = every.join(some, on="case", how="left", maintain_order="left").drop("case")
        return Measurement(metrics, cases)

    def _full_scores(self, model: nn.Module) -> Iterator[tuple[int, Scores]]:
        """The scores of all titles in the cases that rank them, by their place among these."""
        if not self._full:
            return
        prompts = [self._cases[at].prompt for at in self._full]
        for picked, rows in catalogue_scores(model, prompts, self._trie, self._padding):
            if rows.isnan().any():
                raise UserError(NOT_A_NUMBER)
            yield from zip(picked, rows.double().cpu().numpy(), strict=True)

    def _with_protocol(self, model: nn.Module, found: Measurement) -> Measurement:
        candidates, targets = self._candidates()
        texts = generate_answers(model, self._tokenizer, [case.prompt for case in self._cases], GENERATED)
        result = substring_protocol(texts, candidates, targets)
        values = (result.hit_rate, result.hit_rate_valid, result.valid_ratio)
        valid, right = zip(*result.outcomes, strict=True)
        assert found.cases is not None
        cases = found.cases.with_columns(pl.Series(PROTOCOL[0], right), pl.Series(PROTOCOL[2], valid))
        return Measurement(found.metrics | dict(zip(PROTOCOL, values, strict=True)), cases)

    def evaluate_training(self, model: nn.Module, limit: int, seed: int) -> Metrics:
        """Training rows have few rejected items, no list of candidates, so their metrics would not compare."""
        raise UserError("recommendation has no measure over its training rows: leave evaluation.training_cases out")

    def _candidates(self) -> tuple[list[list[str]], list[str]]:
        return [row["candidates"] for row in self._evaluation], [row["target"] for row in self._evaluation]


def _fitting(
    titles: Sequence[str], template: Template, tokenizer: PreTrainedTokenizerBase, context: int
) -> tuple[list[str], set[str]]:
    """The titles that can be ranked, and those that take more than half of the context, as in a ``Recommender``.

    Raises:
        UserError: none can.
    """
    answers = answer_ids(tokenizer, [template.render_answer(title) for title in titles])
    too_long = {title for title, answer in zip(titles, answers, strict=True) if 2 * len(answer) > context}
    if len(too_long) == len(titles):
        raise UserError(f"none of {len(titles)} titles fits half of {context} tokens: raise model.context")
    return [title for title in titles if title not in too_long], too_long


def _lengths(rows: Sequence[Mapping[str, Sequence[int]]], answers: Sequence[Sequence[int]]) -> dict[str, int]:
    """Tokens of the training prompts, after what was cut, and of the titles."""
    prompts = sorted(sum(label == IGNORED for label in row["labels"]) for row in rows)
    titles = sorted(map(len, answers))
    found: dict[str, int] = {}
    for name, lengths in (("a training prompt", prompts), ("a title", titles)):
        if lengths:
            found[f"tokens of {name}, in the middle"] = lengths[len(lengths) // 2]
            found[f"tokens of {name}, at most"] = lengths[-1]
    return found
