"""Reading a run's folder: what is there, what is not, and what could not be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankwise.analysis.ranks import CONFIG, read_adapter
from rankwise.analysis.results import read_rank_rows, read_results
from rankwise.errors import UserError
from rankwise.reading import parse_json, parse_yaml, read_json, read_yaml_text

CASES = "cases"  # a folder of Parquet files, one a row of the results
WITHOUT_RANKS = ("full", "bitfit", "bottleneck", "prompt", "prefix", "vera")
_ABSENT = {
    "recipe.yaml": "the settings are not known",
    "results.json": "the run has not been evaluated",
    "metrics.jsonl": "there are no learning curves",
    "ranks.json": "the ranks are not known",
    "versions.json": "the versions are not known",
}


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it; a part whose file is absent is empty, and named in ``absent``.

    Attributes:
        recipe: the settings, parsed; ``recipe_text`` as they are written.
        metrics: one entry a log line, in order.
        results: ``task``, ``columns``, ``rows``, ``counts`` and ``seconds``.
        ranks: one entry a module.
        absent: for each absent file, what is therefore missing.
        unread: counts of lines and values that could not be read.
    """

    folder: Path
    recipe_text: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    ranks: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, Any] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        UserError: it is no run's folder, or one of its files is not what it should be.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the output folder of a run")
    if not any((folder / name).is_file() for name in ("recipe.yaml", "results.json", "metrics.jsonl")):
        raise UserError(
            f"{folder} is no run, it holds neither recipe.yaml nor results.json nor metrics.jsonl: "
            "give the output folder of `rankwise train`"
        )
    text, recipe = _read_recipe(folder / "recipe.yaml")
    metrics, unread = _read_metrics(folder / "metrics.jsonl")
    ranks, absent_ranks = _ranks(folder, recipe)
    absent = {name: gap for name, gap in _ABSENT.items() if name != "ranks.json" and not (folder / name).is_file()}
    return Run(
        folder,
        text,
        recipe,
        metrics,
        read_results(folder),
        ranks,
        _read_versions(folder / "versions.json"),
        absent | absent_ranks,
        {"lines of metrics.jsonl": unread} if unread else {},
    )


def _ranks(folder: Path, recipe: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Ranks as the run wrote them, or as its adapter has them; zero padding is no rank where it is known."""
    rows = read_rank_rows(folder)
    if rows is not None:
        return [row | {"rank": row.get("live", row["rank"])} for row in rows], {}
    if isinstance(adapter := recipe.get("adapter"), Mapping) and adapter.get("kind") in WITHOUT_RANKS:
        return [], {}
    if not (folder / "adapter" / CONFIG).is_file():
        return [], {"ranks.json": _ABSENT["ranks.json"]}
    found = [
        {
            "module": row["module"],
            "rank": row["live"],
            "initial_rank": row["rank"],
            "parameters": row["parameters"],
        }
        for row in read_adapter(folder / "adapter")[0]
    ]
    return found, {"ranks.json": "the ranks shown are those of the adapter's folder"}


def _read_recipe(path: Path) -> tuple[str, dict[str, Any]]:
    if not path.is_file():
        return "", {}
    text = read_yaml_text(path, "recipe")
    recipe = parse_yaml(text, f"recipe {path}")
    return text, recipe if isinstance(recipe, dict) else {}


def _read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Log lines, and how many were unreadable: a run that was stopped may end in half a line."""
    if not path.is_file():
        return [], 0
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    entries = [entry for entry in map(read_entry, lines) if entry is not None]
    return entries, len(lines) - len(entries)


def read_entry(line: str) -> dict[str, Any] | None:
    """One line of ``metrics.jsonl``, or None where it is no whole JSON object."""
    try:
        entry = parse_json(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _read_versions(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(path, dict, "remove it, or run again") if path.is_file() else {}
    return found


def settings(recipe: Mapping[str, Any] | Sequence[Any], prefix: str = "") -> dict[str, Any]:
    """A recipe flattened to dotted keys, as the command line's overrides write them: ``stages.0.epochs``."""
    items = recipe.items() if isinstance(recipe, Mapping) else enumerate(recipe)
    flat: dict[str, Any] = {}
    for key, value in items:
        name = f"{prefix}{key}"
        flat |= settings(value, f"{name}.") if isinstance(value, Mapping | list) and value else {name: value}
    return flat
