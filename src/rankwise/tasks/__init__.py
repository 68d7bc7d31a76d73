"""How good is it, and what did it forget? Text, instructions, problems, choices and labels, from file to score.

``tables`` reads any file's rows; ``text``, ``instructions`` and ``classification`` make them documents, prompts
with answers, or labelled sentences; ``problems`` and ``maths``, ``choices``, and ``glue`` with ``label_scores`` do
so for published sets and score them as their papers do; ``noise`` puts mistakes into sentences; ``splits`` holds
some out; ``language_loss`` measures answers under a model. Rows become token ids in `rankwise.tokenise` alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankwise.tasks.classification import Classification, read_classification
    from rankwise.tasks.instructions import Instructions, read_instructions
    from rankwise.tasks.language_loss import answer_loss
    from rankwise.tasks.splits import hold_out
    from rankwise.tasks.tables import TableOptions, read_rows
    from rankwise.tasks.text import as_features, pack, read_documents

_HOMES = {
    "Classification": "classification",
    "Instructions": "instructions",
    "TableOptions": "tables",
    "answer_loss": "language_loss",
    "as_features": "text",
    "hold_out": "splits",
    "pack": "text",
    "read_classification": "classification",
    "read_documents": "text",
    "read_instructions": "instructions",
    "read_rows": "tables",
}

__all__ = [
    "Classification",
    "Instructions",
    "TableOptions",
    "answer_loss",
    "as_features",
    "hold_out",
    "pack",
    "read_classification",
    "read_documents",
    "read_instructions",
    "read_rows",
]


def __getattr__(name: str) -> object:
    """Import a public name's home when it is first used, so that one reader does not cost all of them."""
    if name not in _HOMES:
        raise AttributeError(f"module 'rankwise.tasks' has no attribute {name!r}")
    return getattr(importlib.import_module(f"rankwise.tasks.{_HOMES[name]}"), name)
