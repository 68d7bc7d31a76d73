"""Tables of text columns, out of a file of any common kind or a folder of them, a batch of rows at a time."""

from __future__ import annotations

from rankwise.recommend.logs.reading.columns import find_column, find_optional_column
from rankwise.recommend.logs.reading.files import Batch, read_batches, read_table
from rankwise.recommend.logs.reading.forms import Form
from rankwise.recommend.logs.reading.text import ROW

__all__ = ["ROW", "Batch", "Form", "find_column", "find_optional_column", "read_batches", "read_table"]
