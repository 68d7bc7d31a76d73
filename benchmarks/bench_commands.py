"""How long a user waits for the command line: help, and what importing costs beside an empty Python."""

from __future__ import annotations

import argparse
import subprocess
import sys

from timing import Measure, interleaved, machine, ratio, seconds, spread, table

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "python -c 'import rankwise'": ["-c", "import rankwise"],
    "rankwise --help": ["-m", "rankwise.cli", "--help"],
    "rankwise train --help": ["-m", "rankwise.cli", "train", "--help"],
    "python -c 'import torch'": ["-c", "import torch"],
    "python -c 'import rankwise.run'": ["-c", "import rankwise.run"],
}


def measure(words: list[str]) -> Measure:
    """Seconds of a new interpreter."""
    return lambda: seconds(lambda: subprocess.run([sys.executable, *words], check=True, capture_output=True))


def main() -> None:
    """Print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7, help="of each command (%(default)s)")
    runs = parser.parse_args().runs
    found = interleaved({name: measure(words) for name, words in COMMANDS.items()}, runs)
    empty = found["python -c pass"]
    rows = [[name, spread(values), ratio(values, empty)] for name, values in found.items()]
    print(machine(1))
    print(f"{runs} runs of each, in turns: median (least to most)\n")
    print(table(["command", "seconds", "beside an empty Python"], rows))


if __name__ == "__main__":
    main()
