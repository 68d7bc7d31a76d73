"""What the soaks share: readings of a process, and a table that shows whether it stays what it is. Not on Windows."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import psutil

from timing import table

QUARTERS = 4
MEBIBYTE = 2**20


@dataclass
class Reading:
    """What was seen at one moment: resident memory in mebibytes, open files, and how much was done so far."""

    moment: float
    memory: float
    files: int
    done: int


def read(process: psutil.Process, done: int) -> Reading:
    """A reading of now."""
    return Reading(time.monotonic(), process.memory_info().rss / MEBIBYTE, process.num_fds(), done)


def quarters(found: Sequence[Reading], unit: str) -> str:
    """A line for each quarter. Memory that is kept for good raises the least of them, one after the other."""
    bounds = [len(found) * at // QUARTERS for at in range(QUARTERS + 1)]
    parts = [found[start:end] for start, end in itertools.pairwise(bounds)]
    head = ["quarter", "least MiB", "median", "most", "open files", f"{unit}/s"]
    return table(head, [_row(number, part) for number, part in enumerate(parts, start=1)])


def _row(number: int, part: Sequence[Reading]) -> list[str]:
    memory, files = [one.memory for one in part], [one.files for one in part]
    spread = [f"{np.percentile(memory, at):.0f}" for at in (0, 50, 100)]
    rate = (part[-1].done - part[0].done) / (part[-1].moment - part[0].moment)
    return [str(number), *spread, f"{min(files)} to {max(files)}", f"{rate:.2f}"]
