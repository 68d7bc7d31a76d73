"""What next for this user? Interactions, splits, candidates, prompts, metrics and baselines."""

from __future__ import annotations

from rankwise.recommend.baselines.simple import popularity_scores, random_scores, target_places
from rankwise.recommend.candidates import draw_candidates, draw_negatives, with_candidates
from rankwise.recommend.logs.interactions import InteractionColumns, attach_titles, read_interactions
from rankwise.recommend.logs.items import ItemColumns, read_items, tidy_title
from rankwise.recommend.logs.reading import Form
from rankwise.recommend.metrics import ProtocolResult, case_metrics, ranking_metrics, substring_protocol
from rankwise.recommend.prepare import InteractionSettings, WrittenRows, prepare_interactions, write_interactions
from rankwise.recommend.prompts import Template, load_template, template_names
from rankwise.recommend.published import (
    PublishedSettings,
    prepare_published,
    read_candidate_lists,
    read_names,
    read_windows,
)
from rankwise.recommend.rows import Prepared, RowSettings, row_of, write_rows
from rankwise.recommend.splits import Case, Split, SplitSettings, leave_last_out
from rankwise.recommend.synthetic import SyntheticSettings, synthetic_log, write_synthetic

__all__ = [
    "Case",
    "Form",
    "InteractionColumns",
    "InteractionSettings",
    "ItemColumns",
    "Prepared",
    "ProtocolResult",
    "PublishedSettings",
    "RowSettings",
    "Split",
    "SplitSettings",
    "SyntheticSettings",
    "Template",
    "WrittenRows",
    "attach_titles",
    "case_metrics",
    "draw_candidates",
    "draw_negatives",
    "leave_last_out",
    "load_template",
    "popularity_scores",
    "prepare_interactions",
    "prepare_published",
    "random_scores",
    "ranking_metrics",
    "read_candidate_lists",
    "read_interactions",
    "read_items",
    "read_names",
    "read_windows",
    "row_of",
    "substring_protocol",
    "synthetic_log",
    "target_places",
    "template_names",
    "tidy_title",
    "with_candidates",
    "write_interactions",
    "write_rows",
    "write_synthetic",
]
