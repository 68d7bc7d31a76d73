"""What next for this user, out of everything: the best titles of the whole catalogue after a history."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from rankwise.errors import UserError
from rankwise.recommend.ranking import encode_cases, score_candidates
from rankwise.recommend.store import Store
from rankwise.tokenise import answer_ids, encode_prompt, padding_token
from rankwise.trees.search import NOT_A_NUMBER, top_answers
from rankwise.trees.trie import CatalogueTrie


class Recommendation(NamedTuple):
    """A title with its score, and the ids of the items that have it.

    The score is the log-probability, in nats, of the title's tokens and the end of the text after the prompt; their
    mean where lengths are normalised.
    """

    title: str
    score: float
    items: list[str]


@dataclass(frozen=True)
class Ranking:
    """The best titles after a history.

    Attributes:
        best: the highest score first.
        exact: whether no other title can be better; false only where ``most_nodes`` cut the search short.
        read: tokens of titles that went through the model.
    """

    best: list[Recommendation]
    exact: bool
    read: int


class Recommender:
    """Ranks a catalogue after histories.

    Args:
        model: a causal language model, adapted or not; it is put into evaluation mode.
        tokenizer: the model's.
        store: titles, histories, and the template of the prompts.
        context: most tokens of a prompt with an answer.

    Attributes:
        model: as given.
        store: as given.
        titles: those that can be ranked, in the store's order: the others take more than half of the context.
        counts: how many titles are left out for that, have the tokens of another (and so its score), or begin another.

    Raises:
        UserError: no title can be ranked.

    Example:
        >>> recommender = rankwise.load_recommender("runs/films")  # doctest: +SKIP
        >>> [ranking] = recommender.recommend([["Heat (1995)", "Casino (1995)"]], top=5)  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, store: Store, context: int) -> None:
        self.model, self.store = model.eval(), store
        self._tokenizer, self._context = tokenizer, context
        self._padding = padding_token(tokenizer)
        every = store.titles["title"].to_list()
        answers = answer_ids(tokenizer, [store.template.render_answer(title) for title in every])
        fitting = [(title, answer) for title, answer in zip(every, answers, strict=True) if 2 * len(answer) <= context]
        if not fitting:
            raise UserError(f"none of {len(every)} titles fits half of {context} tokens: raise model.context")
        self.titles: list[str] = [title for title, _ in fitting]
        self._answers = [answer for _, answer in fitting]
        self.counts = count_alike(self._answers) | {"titles left out as too long": len(every) - len(fitting)}

    @cached_property
    def trie(self) -> CatalogueTrie:
        """The titles as answers."""
        return CatalogueTrie(self._answers)

    @cached_property
    def _places(self) -> dict[str, int]:
        return {title: place for place, title in enumerate(self.titles)}

    def recommend(
        self,
        histories: Sequence[Sequence[str]],
        top: int = 10,
        *,
        exclude_seen: bool = True,
        length_normalised: bool = False,
        most_nodes: int | None = None,
        ratings: Sequence[Sequence[float | None]] | None = None,
    ) -> list[Ranking]:
        """The ``top`` titles with the highest scores after each history, out of the whole catalogue.

        Args:
            histories: titles, oldest first; the latest are shown in the prompt, as many as in training.
            top: titles for each, 1 or more.
            exclude_seen: leave the titles of a history out.
            length_normalised: rank by the mean log-probability of a title's tokens, and not by the sum.
            most_nodes: tokens of titles that may be read for each history; the ranking is exact without it.
            ratings: of each history's titles, where the template tells them; an empty one is unknown.

        Raises:
            UserError: a history is empty or leaves nothing to recommend, ``top`` or ``most_nodes`` is below 1, a score
                is NaN, or the template shows the candidates: then only a list of them can be ranked.
        """
        if self.store.template.shows_candidates:
            raise UserError(
                f"the prompts of template {self.store.template.name!r} list the candidates: give candidates to rank, "
                "or train with a template without {candidates} to rank the whole catalogue"
            )
        rated = ratings or [()] * len(histories)
        prompts = [self._prompt(*one) for one in zip(histories, rated, strict=True)]
        seen = [self._seen(history) if exclude_seen else frozenset[int]() for history in histories]
        found = top_answers(
            self.model,
            prompts,
            self.trie,
            top,
            self._padding,
            excluded=seen,
            length_normalised=length_normalised,
            most_nodes=most_nodes,
        )
        return [
            Ranking(self._named([self.titles[place] for place in one.places], one.scores), one.exact, one.read)
            for one in found
        ]

    def rank(
        self,
        history: Sequence[str],
        candidates: Sequence[str],
        top: int = 10,
        ratings: Sequence[float | None] = (),
        *,
        length_normalised: bool = False,
    ) -> Ranking:
        """The ``top`` of some titles, which may be new to the catalogue; the prompt lists them where its template does.

        By their log-probabilities, or with ``length_normalised`` by the means over each title's tokens.

        Raises:
            UserError: the history is empty, there are fewer than 2 candidates, one is there twice or does not fit, or a
                score is NaN.
        """
        if len(candidates) < 2 or len(set(candidates)) < len(candidates):
            raise UserError(f"candidates are {list(candidates)}: give 2 or more, each once")
        template = self.store.template
        prompt = self._render(self._shown(history), ratings, candidates)
        answers = [template.render_answer(title) for title in candidates]
        cases, _ = encode_cases(self._tokenizer, [prompt], [answers], self._context)
        [scores] = score_candidates(self.model, cases, self._padding)
        if np.isnan(scores).any():
            raise UserError(NOT_A_NUMBER)
        if length_normalised:
            scores = scores / np.array([len(answer) for answer in cases[0].answers])
        order = (-scores).argsort(kind="stable")[:top]
        best = self._named([candidates[place] for place in order], scores[order].tolist())
        return Ranking(best, True, sum(map(len, cases[0].answers)))

    def _shown(self, history: Sequence[str]) -> Sequence[str]:
        if not history:
            raise UserError("a history is empty: give at least one title")
        return history[-self.store.most_history :]

    def _render(self, shown: Sequence[str], ratings: Sequence[float | None], candidates: Sequence[str] = ()) -> str:
        """The prompt of a history's latest titles, of which the last ratings are."""
        rated = ratings[len(ratings) - len(shown) :] if ratings else ()
        return self.store.template.render(shown, candidates, about=self.store.about, ratings=rated)

    def _prompt(self, history: Sequence[str], ratings: Sequence[float | None] = ()) -> list[int]:
        """Token ids with room for the longest title; where they are too many, the oldest titles go first."""
        shown, room = self._shown(history), self._context - self.trie.longest
        while True:
            prompt = self._render(shown, ratings)
            ids = encode_prompt(self._tokenizer, prompt, self._context)
            if len(ids) <= room:
                return ids
            if len(shown) == 1:
                return encode_prompt(self._tokenizer, prompt, room)
            shown = shown[1:]

    def _seen(self, history: Sequence[str]) -> frozenset[int]:
        places = frozenset(self._places[title] for title in history if title in self._places)
        if len(places) == len(self.titles):
            raise UserError("a history has every title of the catalogue: nothing is left to recommend")
        return places

    def _named(self, titles: Sequence[str], scores: Sequence[float]) -> list[Recommendation]:
        pairs = zip(titles, scores, strict=True)
        return [Recommendation(title, score, self.store.items.get(title, [])) for title, score in pairs]


def count_alike(answers: Sequence[Sequence[int]]) -> dict[str, int]:
    """How many answers are not the first of their tokens, and how many, the end of the text aside, begin another."""
    occurring = Counter(map(tuple, answers))
    beginnings = {answer[:length] for answer in occurring for length in range(1, len(answer) - 1)}
    return {
        "titles with the tokens of another": sum(occurring.values()) - len(occurring),
        "titles that begin another": sum(answer[:-1] in beginnings for answer in occurring),
    }
