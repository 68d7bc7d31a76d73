"""Tables of an adapter's ranks on the console: module by module, and layers by kinds of module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from rankwise.analysis.columns import ABSENT
from rankwise.analysis.ranks import kind_names, rank_grid, split_module

Rows = Sequence[Mapping[str, Any]]
COUNTED = ("live", "parameters", "bytes")


def inspection(rows: Rows, counts: Mapping[str, int]) -> dict[str, Any]:
    """All that the tables show, as data: ``modules``, ``grid`` of live directions, ``kinds`` and ``counts``."""
    return {
        "modules": list(rows),
        "grid": asdict(rank_grid(rows, "live")),
        "kinds": by_kind(rows),
        "counts": dict(counts),
    }


def by_kind(rows: Rows) -> list[dict[str, Any]]:
    """For each ``kind``, in the grid's order: how many ``modules``, their ``live``, ``parameters`` and ``bytes``."""
    names = kind_names(rows)
    of_kind = {name: [row for row in rows if split_module(row["module"])[1] == kind] for kind, name in names.items()}
    return [
        {"kind": name, "modules": len(found), **{key: sum(row[key] for row in found) for key in COUNTED}}
        for name, found in of_kind.items()
    ]


def grid_table(rows: Rows) -> Table:
    """Live directions, layers down and kinds of module across; parameters and bytes of each kind at its foot."""
    grid, kinds = rank_grid(rows, "live"), by_kind(rows)
    table = Table(title="Live directions by layer and kind of module", show_footer=True)
    table.add_column("layer", footer="all layers\nparameters\nbytes", overflow="fold")
    for kind in kinds:
        table.add_column(kind["kind"], justify="right", footer=_foot(kind), overflow="fold")
    everything = {key: sum(kind[key] for kind in kinds) for key in COUNTED}
    table.add_column("all", justify="right", footer=_foot(everything), overflow="fold")
    for layer, ranks in zip(grid.layers, grid.ranks, strict=True):
        shown = ["" if rank is None else str(rank) for rank in ranks]
        table.add_row(layer, *shown, str(sum(rank or 0 for rank in ranks)))
    return table


def _foot(kind: Mapping[str, Any]) -> str:
    return "\n".join(f"{kind[key]:,}" for key in COUNTED)


def rank_table(rows: Sequence[Mapping[str, Any]], counts: Mapping[str, int] | None = None) -> Table:
    """A console table of :func:`read_adapter`'s rows, totals at its foot, what was passed over below it."""
    caption = ", ".join(f"{number} {name}" for name, number in (counts or {}).items())
    stacked = any(row.get("stacked_start") for row in rows)
    title = "Ranks by module" + (" (MiLoRA: rank r is stored as 2 r, with its start)" if stacked else "")
    table = Table(title=title, caption=f"passed over: {caption}" if caption else None, show_footer=True)
    table.add_column("module", footer=f"{len(rows)} modules", overflow="fold")
    totals = {key: sum(row[key] for row in rows) for key in ("rank", "live", "parameters", "bytes")}
    for key, title in (
        ("configured_rank", "configured"),
        ("rank", "stored"),
        ("live", "live"),
        ("effective_rank", "effective"),
        ("parameters", "parameters"),
        ("bytes", "bytes"),
    ):
        table.add_column(title, justify="right", footer=f"{totals[key]:,}" if key in totals else "")
    for row in rows:
        table.add_row(
            row["module"],
            *(str(row[key]) if row[key] is not None else ABSENT for key in ("configured_rank", "rank", "live")),
            f"{row['effective_rank']:.2f}",
            f"{row['parameters']:,}",
            f"{row['bytes']:,}",
        )
    return table
