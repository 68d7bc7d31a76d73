"""Comparisons whose runs are made up."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

from rankwise.comparing.cells import Cell
from rankwise.comparing.choosing import choose
from rankwise.comparing.compare import final_cells
from rankwise.comparing.summary import run_rows, summarise
from rankwise.recipes import make_comparison
from rankwise.schema import Comparison

TASK = {"data": {"kind": "text", "train": "a.txt", "validation": "b.txt"}, "stages": [{"kind": "sft", "epochs": 2}]}
VALUES: dict[str, Any] = {
    "methods": ["lora", {"kind": "milora", "r": 4, "name": "small"}],
    "tasks": {"stories": TASK},
    "learning_rates": [1e-3, 1e-2, 1e-1, 1],
    "output": "out",
}


def made(**changes: Any) -> Comparison:
    return make_comparison(copy.deepcopy(VALUES) | changes)


def fake(losses: Callable[[Cell], float | None], seen: list[list[Cell]]) -> Callable[[Sequence[Cell]], None]:
    """Runs cells by writing what a function of them says."""

    def run(cells: Sequence[Cell]) -> None:
        seen.append(list(cells))
        for one in cells:
            one.folder.parent.mkdir(parents=True, exist_ok=True)
            loss = losses(one)
            rows = [{"name": "sft", "metrics": {"loss": loss}, "cases": 3}]
            figures = {"version": 1, "failed": None if loss is not None else "no", "rows": rows, "columns": ["loss"]}
            one.beside(".json").write_text(json.dumps(figures | {"parameters": 5, "step_seconds": 0.5}))

    return run


def summary_of(comparison: Comparison, losses: Callable[[Cell], float | None]) -> list[dict[str, Any]]:
    """The summary of a comparison whose results are made up."""
    chosen = choose(comparison, fake(losses, []))
    cells = final_cells(comparison, chosen)
    fake(losses, [])(cells)
    return summarise(comparison, run_rows(comparison, cells), chosen)


def whole_summary_of(comparison: Comparison, losses: Callable[[Cell], float | None]) -> list[dict[str, Any]]:
    """The summary of one whose results and search are made up."""
    seen: list[list[Cell]] = []
    chosen = choose(comparison, fake(losses, seen))
    cells = final_cells(comparison, chosen)
    fake(losses, seen)(cells)
    return summarise(comparison, run_rows(comparison, [cell for some in seen for cell in some]), chosen)


def results_of(comparison: Comparison, summary: list[dict[str, Any]]) -> dict[str, Any]:
    """What is made into tables, of a summary."""
    return {"rows": summary, "seeds": comparison.seeds, "against": comparison.baseline, "base": {}}
