"""Rows of a run's results compared on the same cases, and by how popular the true item is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl

from rankwise.analysis.markup import Cell, muted, section, table
from rankwise.analysis.runfolder import CASES, Run
from rankwise.errors import UserError
from rankwise.reading import is_file_name, read_parquet
from rankwise.recommend.cases import ABOUT, ACTIVITY, values
from rankwise.recommend.uncertainty import Comparison, by_group, compare_paired

TITLE = "Case by case"
COMPARED = ("HR@1", "MRR")
GROUPED = "MRR"  # the finest of them: a single place up or down changes it
LEVEL = 0.05
GROUPS = {
    "group": "by the popularity of the true item, with 95 % intervals: the titles with the most interactions, "
    "a third of all, are the head, those with the next third the middle, the others the tail.",
    ACTIVITY: "by how many titles the user chose, with 95 % intervals.",
}


def read_cases(run: Run) -> dict[str, pl.DataFrame]:
    """The cases of each row that has them, in the order of the results.

    Raises:
        UserError: a file is no table, lacks the columns of one, or has other cases than the first.
    """
    found: dict[str, pl.DataFrame] = {}
    for row in run.results.get("rows") or []:
        name = f"{row['name']}.parquet"
        if is_file_name(name) and (run.folder / CASES / name).is_file():
            found[str(row["name"])] = _read(run.folder / CASES / name)
    names = list(found)
    for name in names[1:]:
        if not found[name].select(list(ABOUT)).equals(found[names[0]].select(list(ABOUT))):
            raise UserError(f"{run.folder / CASES}: {name} has other cases than {names[0]}: evaluate the run again")
    return found


def _read(path: Path) -> pl.DataFrame:
    cases: pl.DataFrame = read_parquet(path, "evaluate the run again")
    if missing := [name for name in ABOUT if name not in cases.columns]:
        raise UserError(f"{path} has no column {missing[0]!r}: evaluate the run again")
    return cases


def reference_row(run: Run, names: list[str]) -> str | None:
    """The row that the others are compared with: that of the first stage, which the later ones begin with."""
    stages = run.recipe.get("stages")
    named = stages if isinstance(stages, list) else []
    first = [str(one["name"]) for one in named if isinstance(one, Mapping) and "name" in one]
    return next((name for name in first if name in names), names[-1] if names else None)


def compared(cases: Mapping[str, pl.DataFrame], reference: str) -> dict[str, dict[str, Comparison]]:
    """Of each other row the mean difference from the reference on the same cases."""
    names = [name for name in COMPARED if name in cases[reference].columns]
    return {
        row: {name: compare_paired(values(one, name), values(cases[reference], name)) for name in names}
        for row, one in cases.items()
        if row != reference
    }


def comparison_section(run: Run) -> str:
    """The tables; nothing where no row of the results is known case by case."""
    cases = read_cases(run)
    reference = reference_row(run, list(cases))
    if reference is None:
        return ""
    first = next(iter(cases.values()))
    groups = [_groups(cases, name) for name in GROUPS if name in first.columns]
    return section(TITLE, _differences(cases, reference) + "".join(groups))


def _differences(cases: Mapping[str, pl.DataFrame], reference: str) -> str:
    found = compared(cases, reference)
    if not found:
        return ""
    names = [name for name in COMPARED if name in cases[reference].columns]
    rows: list[list[Cell]] = [
        [(row, ""), *(_difference_cell(one[name]) for name in names)] for row, one in found.items()
    ]
    caption = (
        f"Mean difference from {reference} over the same {len(cases[reference]):,} cases, its 95 % bootstrap interval, "
        f"and p of a paired permutation test; bold where p < {LEVEL}."
    )
    note = muted("Each p stands for itself: of many comparisons without any difference, one in twenty is bold.")
    return table(caption, ["", *names], rows) + note


def _difference_cell(one: Comparison) -> Cell:
    text = f"{one.difference:+.3f} [{one.low:+.3f}, {one.high:+.3f}], p {one.p:.2g}"
    return text, f' class="number{" best" if one.p < LEVEL else ""}"'


def _groups(cases: Mapping[str, pl.DataFrame], column: str) -> str:
    groups = next(iter(cases.values()))[column].to_numpy().astype(str)
    sizes = dict(zip(*np.unique(groups, return_counts=True), strict=True))
    rows: list[list[Cell]] = []
    for name, one in cases.items():
        found = by_group(values(one, GROUPED), groups)
        cells = [found[group][1] for group in sizes]
        texts = [f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, low, high in cells]
        rows.append([(name, ""), *((text, "") for text in texts)])
    head = ["", *(f"{group[2:]} ({size:,} cases)" for group, size in sizes.items())]
    return table(f"{GROUPED} {GROUPS[column]}", head, rows)
