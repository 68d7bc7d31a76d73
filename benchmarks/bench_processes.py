"""What processes of one training send each other: collective operations, and the bytes that one puts into them.

    python benchmarks/bench_processes.py --processes 2

The shipped model is trained by torchrun, once with some steps and once with twice as many: the difference is what a
step takes, the rest is what happens once (joining, the start of an adapter, evaluation, saving). Operations are those
of gloo, as torch's profiler sees them in the first process; bytes are of the tensors that it gives, before an algorithm
divides them into messages.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

OPERATIONS = ("all_reduce", "all_gather", "broadcast", "barrier")
SIZES = {"float": 4, "c10::BFloat16": 2, "int": 4, "long int": 8, "bool": 1, "unsigned char": 1, "double": 8}
BATCH = 4
WAYS: dict[str, dict[str, Any]] = {
    "LoRA": {"adapter": {"kind": "lora", "r": 4}},
    "MiLoRA": {"adapter": {"kind": "milora", "r": 4}},
    "SoRA": {"adapter": {"kind": "sora", "r": 4}},
    "SoRA, shrink_after 2": {"adapter": {"kind": "sora", "r": 4, "shrink_after": 2}},
    "LoRA, spread weights": {"adapter": {"kind": "lora", "r": 4}, "model": {"shard": True}},
    "MiLoRA, spread weights": {"adapter": {"kind": "milora", "r": 4}, "model": {"shard": True}},
}


def trained(path: Path) -> None:
    """Run a recipe in this process, one of several; the first writes its profile beside the recipe."""
    from rich.console import Console
    from torch.profiler import ProfilerActivity, profile

    from rankwise.recipes import make_recipe
    from rankwise.run import Run

    recipe = make_recipe(json.loads(path.read_text(encoding="utf-8")))
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        Run(recipe, Console(file=io.StringIO()))()
    if os.environ["RANK"] == "0":
        found.export_chrome_trace(str(path.with_suffix(".trace")))


def collectives(trace: Path) -> tuple[Counter[str], Counter[str]]:
    """How many operations of each kind a profile has, and the bytes that went into them."""
    calls: Counter[str] = Counter()
    sent: Counter[str] = Counter()
    for event in json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]:
        name = event.get("name", "").removeprefix("gloo:")
        if name not in OPERATIONS or not event["name"].startswith("gloo:"):
            continue
        calls[name] += 1
        known = event["args"]
        for shape, kind in zip(known.get("Input Dims", []), known.get("Input type", []), strict=True):
            count = 1
            for side in shape if all(isinstance(side, int) for side in shape) else []:
                count *= side
            sent[name] += count * SIZES.get(kind, 0) if shape else 0
    return calls, sent


def measured(folder: Path, processes: int, changes: dict[str, Any], steps: int) -> tuple[Counter[str], Counter[str]]:
    """The operations of a training of so many steps."""
    lines = [f"Film number {number} was seen by many." for number in range(BATCH * 4)]
    stage = {"kind": "sft", "epochs": steps / 4, "batch_size": BATCH, "loss": "row"}
    data = {"kind": "instructions", "train": str(folder / "rows.jsonl"), "validation": str(folder / "rows.jsonl")}
    rows = [json.dumps({"prompt": line, "completion": " It was good."}) for line in lines]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    recipe = {"data": data, "stages": [stage], "output": str(folder / f"run-{steps}"), **changes}
    path = folder / f"{steps}.json"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [*launch, __file__, "--recipe", str(path)], env=environment, check=False, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return collectives(path.with_suffix(".trace"))


def main() -> None:
    """Measure each way and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="of the shorter training; a multiple of 4")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--recipe", type=Path, help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.recipe:
        return trained(wanted.recipe)
    print(f"{wanted.processes} processes, the shipped model, {wanted.steps} and {2 * wanted.steps} steps\n")
    print("| training | " + " | ".join(f"{name} a step (bytes)" for name in OPERATIONS) + " | once |")
    print("|---|" + "---:|" * (len(OPERATIONS) + 1))
    for name in wanted.ways:
        with tempfile.TemporaryDirectory() as folder:
            calls, sent = measured(Path(folder), wanted.processes, WAYS[name], wanted.steps)
            more, more_sent = measured(Path(folder), wanted.processes, WAYS[name], 2 * wanted.steps)
        cells = []
        for operation in OPERATIONS:
            each = (more[operation] - calls[operation]) / wanted.steps
            cells.append(f"{each:.2f} ({(more_sent[operation] - sent[operation]) / wanted.steps:,.0f})")
        once = 2 * sum(sent.values()) - sum(more_sent.values())
        print(f"| {name} | " + " | ".join(cells) + f" | {once:,} B |", flush=True)


if __name__ == "__main__":
    main()
