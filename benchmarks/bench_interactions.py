"""Preparing a log of any length: rows a second and peak memory, in parts and as a whole.

The log is generated: users and items by a long-tailed popularity, times at random, one row in ten thousand broken. Each
measurement is a process of its own, which reads the files, cleans, splits and writes rows with prompt, chosen and
rejected answers; its peak memory is what the system says of it.

    python benchmarks/bench_interactions.py --rows 1000000 10000000 50000000
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from rankwise.recommend import InteractionSettings, write_interactions
from timing import machine, peak_memory, table

CHUNK = 1_000_000  # rows that are generated together
ITEMS = 200_000
PER_USER = 100
WHOLE = 10_000_000  # rows of the longest log that is also worked on as a whole


def generate(folder: Path, rows: int, form: str) -> None:
    """Files of a million rows, and the list of items."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    users = max(rows // PER_USER, 1)
    for at in range(0, rows, CHUNK):
        size = min(CHUNK, rows - at)
        chunk = pl.DataFrame(
            {
                "user_id": (users * random.random(size) ** 1.5).astype(np.int64),
                "item_id": (ITEMS * random.random(size) ** 3).astype(np.int64),
                "rating": random.integers(1, 6, size),
                "timestamp": random.integers(1_500_000_000, 1_700_000_000, size),
            }
        )
        path = folder / f"part-{at // CHUNK:04d}.{form}"
        if form == "csv":
            chunk.write_csv(path)
            with path.open("a") as file:
                file.writelines("broken,row\n" for _ in range(size // 10_000))
        else:
            chunk.write_parquet(path)


def titles(path: Path) -> None:
    """A title for each item."""
    numbers = pl.Series("item_id", range(ITEMS))
    pl.DataFrame(
        {"item_id": numbers, "title": [f"The Title of Number {number} ({1950 + number % 70})" for number in numbers]}
    ).write_csv(path)


def prepare(log: str, items: str, out: str, in_memory: int) -> None:
    """In a process of its own: what it took."""
    started = time.perf_counter()
    settings = InteractionSettings(
        ratings=Path(log), items=Path(items), minimum_rating=2, core=5, training_rows=100_000, evaluation_cases=10_000,
        rows_in_memory=in_memory,
    )  # fmt: skip
    found = write_interactions(Path(out), settings)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak": peak_memory(), "counts": found.counts}))


def measured(folder: Path, rows: int, form: str, in_memory: int) -> dict[str, Any]:
    log, out = folder / f"{form}-{rows}", folder / "out"
    if not log.exists():
        generate(log, rows, form)
    command = [sys.executable, __file__, "--child", str(log), str(folder / "items.csv"), str(out), str(in_memory)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    shutil.rmtree(out)
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--form", nargs="+", default=["csv", "parquet"], choices=["csv", "parquet"])
    parser.add_argument("--in-memory", type=int, default=4_000_000, help="rows that are worked on together")
    parser.add_argument("--folder", help="where the log is generated; by default a temporary one")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        log, items, out, in_memory = arguments.child
        prepare(log, items, out, int(in_memory))
        return
    print(machine(2))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as made:
        folder = Path(made)
        titles(folder / "items.csv")
        lines = []
        for rows in arguments.rows:
            for form in arguments.form:
                ways = [arguments.in_memory] + ([rows + 1] if arguments.in_memory < rows <= WHOLE else [])
                for in_memory in ways:
                    found = measured(folder, rows, form, in_memory)
                    counts = found["counts"]
                    lines.append(
                        [
                            f"{rows:,}", form, f"{in_memory:,}", f"{found['seconds']:.1f} s",
                            f"{rows / found['seconds']:,.0f}", f"{found['peak']:,.0f} MiB",
                            f"{counts['unparsable rows']:,}", f"{counts['users']:,}",
                        ]
                    )  # fmt: skip
                    print(lines[-1], flush=True)
                shutil.rmtree(folder / f"{form}-{rows}")
    head = ["rows", "form", "together", "time", "rows a second", "peak memory", "broken rows", "users kept"]
    print(table(head, lines))


if __name__ == "__main__":
    main()
