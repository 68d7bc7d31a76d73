"""``results.json`` and ``ranks.json`` of a run: what they hold, and a check that they hold it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Required

from pydantic import Field, StrictInt, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from rankwise.errors import UserError, cut
from rankwise.reading import read_json

RESULTS, RANKS = "results.json", "ranks.json"
Number = StrictInt | Annotated[float, Field(strict=True)]
Size = Annotated[int, Field(strict=True, ge=0)]
Numbers = dict[str, Number | None]
Check = Callable[[Any], object]


class Row(TypedDict, total=False):
    """A model, or a baseline, that was measured."""

    name: Required[str]
    metrics: Required[Numbers]
    cases: Size | None
    intervals: dict[str, tuple[Number, Number] | None] | None
    training_metrics: Numbers | None
    training_cases: Size | None
    adapter: Numbers | None


class Results(TypedDict, total=False):
    """What a run measured, counted and took; further keys are passed over."""

    task: str | None
    columns: Required[list[str]]
    rows: Required[list[Row]]
    labels: list[str] | None
    counts: dict[str, Number] | None
    seconds: dict[str, Number] | None
    export: dict[str, Any] | None
    drift: dict[str, Numbers] | None
    not_looked_at: dict[str, str] | None


class Rank(TypedDict, total=False):
    """The directions of a module."""

    module: Required[str]
    rank: Required[Size]
    live: Size
    initial_rank: Size | None
    parameters: Size | None


_IS_RESULTS, _IS_RANKS = TypeAdapter(Results).validate_python, TypeAdapter(list[Rank]).validate_python


def read_results(folder: Path) -> dict[str, Any]:
    """``results.json`` of a run, checked; empty where there is none, or nothing in it.

    Raises:
        UserError: it is no JSON, or not what a run writes.
    """
    found: dict[str, Any] = _read(Path(folder) / RESULTS, dict, _IS_RESULTS, "evaluate the run again") or {}
    return found


def read_rank_rows(folder: Path) -> list[dict[str, Any]] | None:
    """``ranks.json`` of a run, checked; None where there is none.

    Raises:
        UserError: it is no JSON, or not what a run writes.
    """
    found: list[dict[str, Any]] | None = _read(Path(folder) / RANKS, list, _IS_RANKS, "export the adapter again")
    return found


def check_rows(path: Path, value: dict[str, Any], remedy: str) -> None:
    """See that a file of results has columns, and at least one row.

    Raises:
        UserError: it does not.
    """
    _check(path, {name: value.get(name) for name in ("columns", "rows")}, _IS_RESULTS, remedy)
    if not value["rows"]:
        raise UserError(f"{path} has no row of results: {remedy}")


def _read(path: Path, kind: type, check: Check, remedy: str) -> Any:
    if not path.is_file():
        return None
    value = read_json(path, kind, remedy)
    if value:
        _check(path, value, check, remedy)
    return value


def _check(path: Path, value: Any, check: Check, remedy: str) -> None:
    try:
        check(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = cut(".".join(map(str, first["loc"])), 200)
        raise UserError(f"{path}: {place}: {first['msg']}: {remedy}") from error
