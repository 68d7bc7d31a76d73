"""A long training: whether memory, open files and the time of a step stay what they are.

    python benchmarks/bench_training_soak.py --soak 3600

`rankwise train` on the shipped model and a synthetic log: a short supervised stage, then softmax-DPO with answers drawn
anew, SoRA's gates, and a checkpoint every few seconds. Its resident memory, its open files and the step of its last
checkpoint are read all along. It ends with SIGTERM, after which a checkpoint must be there, and the status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from rankwise.recommend.synthetic import SyntheticSettings, write_synthetic
from soaking import Reading, quarters, read
from timing import machine

MOMENT = 0.5  # seconds between two readings


def written(folder: Path, checkpoints: float) -> Path:
    """The recipe's file."""
    ratings, items = write_synthetic(folder / "log", SyntheticSettings(users=120))
    first = {"kind": "sft", "epochs": 1, "batch_size": 8, "learning_rate": 1e-3}
    second = {"kind": "softmax_dpo", "epochs": 10_000, "batch_size": 4, "negatives": 3, "draw": "uniform"}
    recipe = {
        "adapter": {"kind": "sora", "r": 8, "threshold": 1e-5},
        "data": {"kind": "interactions", "interactions": str(ratings), "items": str(items), "rows": 400},
        "stages": [first, second | {"name": "long", "learning_rate": 1e-5, "schedule": "constant"}],
        "evaluation": {"cases": 20, "base": False},
        "checkpoint_seconds": checkpoints,
        "output": str(folder / "run"),
    }
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def readings(process: subprocess.Popen[str], checkpoints: Path, seconds: float) -> list[Reading]:
    """From the first checkpoint on."""
    seen, found = psutil.Process(process.pid), list[Reading]()
    while process.poll() is None and (not found or found[-1].moment - found[0].moment < seconds):
        steps = [int(path.name.rpartition("-")[2]) for path in checkpoints.glob("checkpoint-*")]
        if steps:
            found.append(read(seen, done=max(steps)))
        time.sleep(MOMENT)
    return found


def main() -> None:
    """Print a line for each quarter; exit with 1 where the training did not end as it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--soak", type=float, default=3600.0, metavar="SECONDS", help="from the long stage's first log on"
    )
    parser.add_argument("--checkpoints", type=float, default=10.0, help="seconds between two (%(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    wanted = parser.parse_args()
    environment = os.environ | {"OMP_NUM_THREADS": str(wanted.threads), "HF_HUB_OFFLINE": "1"}
    print(machine(wanted.threads))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        command = [sys.executable, "-m", "rankwise", "train", str(written(folder, wanted.checkpoints))]
        checkpoints = folder / "run" / "checkpoints" / "long"
        with (
            (folder / "told.txt").open("w") as told,
            subprocess.Popen(command, stdout=told, stderr=told, text=True, env=environment) as run,
        ):
            found = readings(run, checkpoints, wanted.soak)
            run.terminate()
            status = run.wait(timeout=60)
        left = [path.name for path in checkpoints.glob("checkpoint-*")]
        last = (folder / "told.txt").read_text(encoding="utf-8").strip().splitlines()[-1]
    print(f"{found[-1].moment - found[0].moment:.0f} s of the long stage; status {status}; {last}\n")
    print(quarters(found, "steps"))
    if status != 1 or not left:
        sys.exit(1)


if __name__ == "__main__":
    main()
