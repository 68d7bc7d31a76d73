"""What `rankwise compare` runs: methods, tasks, learning rates and seeds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from rankwise.errors import nearest, shown
from rankwise.schema.base import Count, File, FolderName, Positive, Section, Seed, Share, of_any_system, repeated
from rankwise.schema.methods import METHODS, written_out

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$"  # of a method or a task: they become parts of file names


class MethodEntry(Section):
    """A method by name, or with settings of its own; all other keys are those of a recipe's adapter."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    name: FolderName = Field("", pattern=NAME, description="Shown in the tables; the kind if not given.")
    kind: str = Field(description="A method's name.")
    learning_rates: list[Positive] | None = Field(None, min_length=1, description="To try instead of everybody's.")
    ranks: list[Count] | None = Field(None, min_length=1, description="To try instead of everybody's.")
    budgets: list[Share] | None = Field(None, min_length=1, description="To try instead of everybody's.")

    @property
    def adapter(self) -> dict[str, Any]:
        """The adapter section of its recipes, without a rank that is tried out."""
        return {"kind": self.kind, **(self.model_extra or {})}

    @property
    def has_budget(self) -> bool:
        """Whether the method has a budget of parameters, and the entry leaves it open."""
        return METHODS[self.kind].settings["kind"] == "sora" and not self.own_budget

    @property
    def own_budget(self) -> list[str]:
        """Settings of the entry that are budgets."""
        return [name for name in ("target_ratio", "target_parameters") if name in self.adapter]


def _check_budgets(entry: MethodEntry) -> None:
    if METHODS[entry.kind].settings["kind"] != "sora":
        raise ValueError(f"methods.{entry.name}.budgets is for SoRA, not {entry.kind}: leave it out")
    if entry.own_budget:
        raise ValueError(f"methods.{entry.name} has {entry.own_budget[0]} and budgets {entry.budgets}: leave one out")


def _check_once(section: Section, where: str, fields: Sequence[str]) -> None:
    for field in fields:
        _check_list_once(f"{where}{field}", getattr(section, field) or [])


def _check_list_once(where: str, given: Sequence[int | float]) -> None:
    if len(set(given)) < len(given):
        raise ValueError(f"{where} {given} has one of them twice: leave it out")


class Search(Section):
    """Choice of each method's learning rate, rank and budget, by successive halving on held-out data.

    Source: arXiv 1502.07943.
    """

    first: float = Field(0.25, gt=0, le=1, description="Share of the epochs in the first round.")
    factor: int = Field(2, ge=2, description="By this much each round is longer and tries fewer settings.")
    seeds: list[Seed] = Field(
        [0], min_length=1, description="Of the runs in the search, and of what they hold out: means decide."
    )
    seeds_of: dict[str, Annotated[list[Seed], Field(min_length=1)]] = Field(
        {}, description="By the name of a task, its seeds in place of `seeds`."
    )


class Comparison(Section):
    """Every method on every task, with the same rows and epochs, over several seeds."""

    name: str = Field("comparison", description="Shown in the report.")
    methods: list[MethodEntry] = Field(min_length=1, description="Names, or a name as kind with settings.")
    tasks: dict[str, dict[str, Any]] = Field(
        min_length=1, description="By name: a recipe each, without adapter, seed and output."
    )
    shared: dict[str, Any] = Field({}, description="What all tasks' recipes have, where they do not say otherwise.")
    learning_rates: list[Positive] = Field(min_length=1, description="To choose each method's from.")
    ranks: list[Count] = Field([], description="To choose each method's from, where it has one; as set if not given.")
    budgets: list[Share] = Field(
        [], description="To choose the share of parameters that SoRA keeps from; as set if not given."
    )
    seeds: list[Seed] = Field([0, 1, 2], min_length=1, description="Of the runs that are reported.")
    against: str | None = Field(None, description="Method that the others are compared with; the first if not given.")
    metrics: dict[str, str] = Field({}, description="Of a task, the metric that decides; its first if not given.")
    search: Search = Search()
    processes: Count = Field(1, description="Runs at the same time on this machine.")
    keep: Literal["none", "adapters"] = Field("none", description="Of the reported runs: figures, or adapters too.")
    output: File = Field(description="Folder of the comparison; one that was begun goes on.")

    @model_validator(mode="before")
    @classmethod
    def _names(cls, values: Any) -> Any:
        """A method's bare name is an entry too, and an entry is called by its kind where it has no name."""
        if isinstance(values, dict) and isinstance(values.get("methods"), list):
            entries = [{"kind": one} if isinstance(one, str) else one for one in values["methods"]]
            named = [{"name": one.get("kind", ""), **one} if isinstance(one, dict) else one for one in entries]
            return values | {"methods": named}
        return values

    @model_validator(mode="after")
    def _known(self) -> Comparison:
        """Names are unique and known."""
        names = [entry.name for entry in self.methods]
        if twice := repeated(names):
            raise ValueError(f"methods {twice!r} occurs twice, letters' case aside: give each entry a name of its own")
        for entry in self.methods:
            if entry.kind not in METHODS:
                raise ValueError(f"methods {entry.kind!r} is no method: {nearest(entry.kind, METHODS)}")
            written_out(entry.adapter)
        if self.against is not None and self.against not in names:
            raise ValueError(f"against {self.against!r} is none of the methods: {nearest(self.against, names)}")
        for task in self.tasks:
            if not re.fullmatch(NAME, task):
                raise ValueError(
                    f"tasks {shown(task)} becomes a part of file names: take up to 80 letters, digits, '.', '_' and '-'"
                )
            of_any_system(task)
        for entry in self.methods:
            if entry.ranks and "r" in entry.adapter:
                raise ValueError(
                    f"methods.{entry.name} has r {entry.adapter['r']} and ranks {entry.ranks}: leave one out"
                )
            if entry.budgets:
                _check_budgets(entry)
            _check_once(entry, f"methods.{entry.name}.", ("learning_rates", "ranks", "budgets"))
        for task in self.metrics:
            if task not in self.tasks:
                raise ValueError(f"metrics.{task} is of no task: {nearest(task, self.tasks)}")
        _check_once(self, "", ("seeds", "learning_rates", "ranks", "budgets"))
        _check_once(self.search, "search.", ("seeds",))
        for task, seeds in self.search.seeds_of.items():
            if task not in self.tasks:
                raise ValueError(f"search.seeds_of.{task} is of no task: {nearest(task, self.tasks)}")
            _check_list_once(f"search.seeds_of.{task}", seeds)
        return self

    @property
    def baseline(self) -> str:
        """The method that the others are compared with."""
        return self.against or self.methods[0].name
