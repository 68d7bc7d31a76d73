"""Why: spectra, updates against weights, ranks, results as tables, and the report of a run."""

from __future__ import annotations

from rankwise.analysis.inspection import grid_table, rank_table
from rankwise.analysis.ranks import rank_grid, read_adapter, read_ranks, split_module
from rankwise.analysis.report import write_report
from rankwise.analysis.representations import linear_cka
from rankwise.analysis.spectra import UpdateOverlap, effective_rank, subspace_overlap, update_overlap
from rankwise.analysis.tables import combined, result_markdown, result_table
from rankwise.analysis.updates import Intruders, Projections, intruder_dimensions, projections

__all__ = [
    "Intruders",
    "Projections",
    "UpdateOverlap",
    "combined",
    "effective_rank",
    "grid_table",
    "intruder_dimensions",
    "linear_cka",
    "projections",
    "rank_grid",
    "rank_table",
    "read_adapter",
    "read_ranks",
    "result_markdown",
    "result_table",
    "split_module",
    "subspace_overlap",
    "update_overlap",
    "write_report",
]
