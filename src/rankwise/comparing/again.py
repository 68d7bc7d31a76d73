"""A single run of a comparison once more, beside the figures that it gave before."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rankwise.analysis.columns import Number
from rankwise.comparing.cells import CELLS, read_result
from rankwise.comparing.choosing import final_row
from rankwise.comparing.running import ending, in_a_process, threads_of
from rankwise.comparing.summary import restore
from rankwise.errors import UserError, nearest
from rankwise.files import write_text
from rankwise.recipes import dump_recipe, load_recipe
from rankwise.saying import say
from rankwise.schema import Comparison
from rankwise.versions import differing


def run_again(comparison: Comparison, name: str, console: Console) -> dict[str, Any]:
    """Run one cell again, with as many threads as before, and show its metrics then and now.

    What the comparison holds is left as it is.

    Args:
        comparison: that it is of.
        name: the cell's, or the beginning of it.
        console: shows the table.

    Returns:
        The cell's name as ``run``, its metrics ``then`` and ``now``, whether they are the ``same``: not where the
        run failed, which has none; the first logged step whose training loss is another, as ``losses_differ_from``,
        None where there is none, or where the run kept no losses, which is said: metrics that count rows hide small
        differences; and what it stood on then that is another now, as ``differing``.

    Raises:
        UserError: no finished cell has the name, or several do, its figures are not as they were written, or the run
            ended without a result.
    """
    folder = Path(comparison.output)
    restore(folder)
    cell = _named(folder / CELLS, name)
    before = read_result(cell)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / f"{cell.stem}.yaml"
        recipe = load_recipe(cell.with_suffix(".yaml"))
        write_text(file, dump_recipe(recipe.model_copy(update={"output": str(file.with_suffix(""))})))
        threads = before.get("threads") or threads_of(comparison.processes)
        status = in_a_process(file, False, threads, Path.cwd())
        result = file.with_suffix(".json")
        if not result.is_file():
            raise UserError(f"the run ended without a result, {ending(status, file.with_suffix('.log'))}")
        after = read_result(result)
    then, now = ((final_row(one) or {"metrics": {}})["metrics"] for one in (before, after))
    console.print(_table(cell.stem, then, now))
    for one in (before, after):
        if one.get("failed"):
            say(console, f"  {one['failed']}", dim=True)
    others = differing(before.get("versions") or {}, after.get("versions") or {})
    for what, (earlier, later) in others.items():
        say(console, f"  {what} was {earlier} then, and is {later} now", dim=True)
    losses = before.get("curve") or []
    step = _first_difference(losses, after.get("curve") or [])
    if step is not None:
        say(console, f"  training losses differ from step {step} on", dim=True)
    elif then and not losses:
        say(console, "  training losses were not kept then: metrics alone are compared", dim=True)
    same = bool(then) and then == now
    return {"run": cell.stem, "then": then, "now": now, "same": same, "losses_differ_from": step, "differing": others}


def _first_difference(then: Sequence[Sequence[Number]], now: Sequence[Sequence[Number]]) -> Number | None:
    """The first step at which two curves, of steps with a loss, are not the same; None where there is none."""
    return next((one[0] for one, other in zip(then, now, strict=False) if one != other), None)


def _named(cells: Path, name: str) -> Path:
    known = {path.stem: path for path in sorted(cells.glob("*.json"))}
    found = [path for stem, path in known.items() if stem.startswith(name)]
    if name in known:
        return known[name]
    if not found:
        raise UserError(f"{cells} has no finished run {name!r}: {nearest(name, known)}")
    if len(found) > 1:
        several = ", ".join(path.stem for path in found[:4])
        raise UserError(f"{len(found)} runs of {cells} begin with {name!r}: {several}; give more of the name")
    return found[0]


def _table(name: str, then: dict[str, float], now: dict[str, float]) -> Table:
    table = Table(title=name, title_justify="left", box=None)
    for heading in ("metric", "then", "now", "difference"):
        table.add_column(heading, justify="left" if heading == "metric" else "right")
    for metric in dict.fromkeys([*then, *now]):
        pair = [values.get(metric) for values in (then, now)]
        written = ["-" if value is None else f"{value:.10g}" for value in pair]
        known = [value for value in pair if value is not None]
        table.add_row(Text(metric), *written, f"{known[1] - known[0]:.3g}" if len(known) == 2 else "-")
    return table
