"""The benchmarks that need no data run, on models that are too small to say anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import polars as pl

from page_checks import NEEDS_DRIVER

ROOT = Path(__file__).resolve().parent.parent


def test_the_step_of_sora_is_measured_to_the_end() -> None:
    script = ROOT / "benchmarks" / "bench_sora_step.py"
    settings = ["--runs", "1", "--layers", "1", "--hidden", "64", "--threads", "1"]
    done = subprocess.run([sys.executable, script, *settings], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 8 and all("ms (" in line for line in table if line.startswith("| SoRA"))


def test_the_ways_of_a_preference_step_and_the_trainings_beside_trl_are_measured_to_the_end() -> None:
    script = ROOT / "benchmarks" / "bench_preferences.py"
    settings = ["--runs", "1", "--shapes", "tiny", "--negatives", "3", "--prompt", "40", "--threads", "1"]
    settings += ["--trainings", "tiny", "--steps", "2", "--batch", "2"]
    done = subprocess.run([sys.executable, script, *settings], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    table = [line.strip("| ").split("|") for line in done.stdout.splitlines() if line.startswith("|")]
    steps, trainings = table[2:6], table[8:]
    assert len(trainings) == 4 and {len(line) for line in steps} == {11}
    assert all(float(cell) < 1e-4 for line in steps for cell in line[-2:])
    assert all(float(line[-1]) < 1e-4 for line in trainings)


def test_the_step_of_each_method_is_measured_to_the_end() -> None:
    script = ROOT / "benchmarks" / "bench_methods.py"
    settings = ["--runs", "1", "--steps", "2", "--batch", "1", "--length", "16", "--threads", "1"]
    settings += ["--methods", "lora", "sora", "full", "bitfit"]
    done = subprocess.run([sys.executable, script, *settings], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "bitfit: adapter.kind bitfit trains biases" in done.stdout
    table = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
    assert [line[0] for line in table[2:]] == ["lora", "sora", "full"]
    assert table[2][-1] == "1.00 (1.00 to 1.00)" and all("ms (" in line[2] for line in table[2:])


def test_attention_in_bfloat16_is_measured_to_the_end() -> None:
    script = ROOT / "benchmarks" / "bench_attention.py"
    settings = ["--runs", "1", "--lengths", "8", "--threads", "1"]
    done = subprocess.run([sys.executable, script, *settings], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    table = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
    assert [line[0].split(",")[0] for line in table[2:]] == ["attention", "step"]
    assert all("ms (" in cell for line in table[2:] for cell in line[2:5])


def test_the_tables_on_encoders_are_printed_from_the_runs_that_were_kept() -> None:
    script, runs = ROOT / "benchmarks" / "encoder_table.py", ROOT / "benchmarks" / "results" / "encoders.parquet"
    done = subprocess.run([sys.executable, script, runs], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    [scores, differences, robustness] = [block.splitlines()[2:] for block in done.stdout.strip().split("\n\n")]
    assert (len(scores), len(differences), len(robustness)) == (20, 19, 20)
    [lora] = [line for line in robustness if line.startswith("| LoRA ")]
    kept = pl.read_parquet(runs).filter(part="final", task="sst2", method="lora")["value"]
    assert f"| {kept.mean():.4f} ± {kept.std():.4f} ".replace("0.", ".") in lora


@NEEDS_DRIVER
def test_the_page_of_200_runs_is_drawn_to_the_end() -> None:
    script = ROOT / "benchmarks" / "bench_page.py"
    done = subprocess.run([sys.executable, script, "--runs", "1"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[1].startswith("200 runs, ") and len(said) == 5 and all(" s (" in line for line in said[2:])
