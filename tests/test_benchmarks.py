"""The benchmarks that need no data run, on models that are too small to say anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_step_of_sora_is_measured_to_the_end() -> None:
    script = ROOT / "benchmarks" / "bench_sora_step.py"
    settings = ["--runs", "1", "--layers", "1", "--hidden", "64", "--threads", "1"]
    done = subprocess.run([sys.executable, script, *settings], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 8 and all("ms (" in line for line in table if line.startswith("| SoRA"))
