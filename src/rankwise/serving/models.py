"""The stages of a run as recommenders that share one base model, one catalogue and one trie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from rankwise.analysis.runfolder import read_results
from rankwise.errors import UserError
from rankwise.evaluation import open_run, trained_stage
from rankwise.recommend.recommender import Ranking, Recommender
from rankwise.recommending import load_recommender


@dataclass(frozen=True)
class Question:
    """What a history is asked: among the catalogue, or some candidates."""

    history: tuple[str, ...]
    top: int
    candidates: tuple[str, ...] | None = None


class Stages:
    """Recommenders by stage, in the order of training.

    Args:
        name: of the run.
        recommenders: one or more, of one store.
    """

    def __init__(self, name: str, recommenders: Mapping[str, Recommender]) -> None:
        self.name, self.recommenders = name, dict(recommenders)
        self.store = next(iter(self.recommenders.values())).store

    @property
    def names(self) -> list[str]:
        """The stages."""
        return list(self.recommenders)

    def answer(self, key: tuple[str, bool], questions: Sequence[Question]) -> list[Ranking | UserError]:
        """Rankings of one stage, those of the catalogue computed together; errors of those that cannot be answered.

        Args:
            key: the stage, and whether what is in a history is left out.
            questions: one or more.
        """
        try:
            return [*self._answers(*key, questions)]
        except UserError as error:
            if len(questions) == 1:
                return [error]
        return [answer for one in questions for answer in self.answer(key, [one])]

    def _answers(self, stage: str, exclude_seen: bool, questions: Sequence[Question]) -> list[Ranking]:
        recommender = self.recommenders[stage]
        whole = [one for one in questions if one.candidates is None]
        found: list[Ranking] = []
        if whole:
            top = max(one.top for one in whole)
            found = recommender.recommend([one.history for one in whole], top, exclude_seen=exclude_seen)
        cut = (
            Ranking(ranking.best[: one.top], ranking.exact, ranking.read)
            for one, ranking in zip(whole, found, strict=True)
        )
        return [
            next(cut) if one.candidates is None else recommender.rank(one.history, one.candidates, one.top)
            for one in questions
        ]


def load_stages(run: Path, names: Sequence[str] = ()) -> Stages:
    """The named stages of a run, or all finished ones.

    Their models share the base's memory: a stage more costs its adapter's.

    Raises:
        UserError: the folder is no finished run of a recommender, or has no such stage.
    """
    run = Path(run)
    recipe = open_run(run)
    finished = {row["name"] for row in read_results(run).get("rows", [])}
    wanted = list(dict.fromkeys(names)) or [one.name for one in recipe.stages if one.name in finished]
    if not wanted:
        raise UserError(f"{run} has no finished stage: go on with `rankwise train --resume`")
    first = load_recommender(run, wanted[0])
    found = {wanted[0]: first}
    for name in wanted[1:]:
        model = trained_stage(run, recipe, name)
        share_weights(first.model, model)
        found[name] = first.with_model(model)
    first.trie  # noqa: B018 - made before the first request
    return Stages(recipe.name, found)


def share_weights(one: nn.Module, other: nn.Module) -> int:
    """Let the parameters of another model that are equal to those of the same name use their memory.

    Returns:
        Bytes that the other model no longer has of its own.
    """
    known, saved = dict(one.named_parameters()), 0
    for name, value in other.named_parameters():
        same = known.get(name)
        if same is not None and same.dtype == value.dtype and torch.equal(same, value):
            value.data = same.data
            saved += value.nbytes
    return saved
