"""What the benchmarks share: runs taken in turns, their median and spread, and the machine's name."""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

Measure = Callable[[], float]


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock time of one call, in seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def interleaved(measures: Mapping[str, Measure], runs: int, warm_up: bool = True) -> dict[str, list[float]]:
    """Take each measure ``runs`` times, in turns, so that a slow spell of the machine falls on all of them."""
    if warm_up:
        for measure in measures.values():
            measure()
    found: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(runs):
        for name, measure in measures.items():
            found[name].append(measure())
    return found


def spread(values: Sequence[float], unit: str = "s", digits: int = 3) -> str:
    """Median with the smallest and the largest value."""
    middle, least, most = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} {unit} ({least:.{digits}f} to {most:.{digits}f})"


def ratio(values: Sequence[float], others: Sequence[float]) -> str:
    """Median of the ratios of runs that were taken one after the other."""
    pairs = [one / other for one, other in zip(values, others, strict=True)]
    return f"{statistics.median(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f})"


def peak_memory() -> float:
    """The largest resident memory of this process so far, in mebibytes; NaN where the system is not Linux."""
    # Not getrusage: a new process begins with the peak of the one that started it.
    path = Path("/proc/self/status")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), math.nan)


def forget_peak() -> None:
    """Let :func:`peak_memory` begin anew; on Linux."""
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5", encoding="utf-8")


def machine(threads: int) -> str:
    """Processor, cores, threads used and Python, as one line."""
    software = f"{platform.system()}, Python {platform.python_version()}"
    return f"{_processor()}, {os.cpu_count()} cores, {threads} threads, {software}"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table whose columns stand below one another."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)
