"""The start of a whole model's adapter, streamed from its files: time and memory as the model grows.

Each measurement is a process of its own: the largest resident memory, less what it was before (Linux only). A model of
more layers takes longer, and no more memory.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rankwise.directions import MiloraConfig, initialise
from rankwise.models import quiet_libraries
from timing import machine, peak_memory, table

HIDDEN = 1024


def write_model(folder: Path, layers: int) -> float:
    """A Llama with random weights in bfloat16, in several files; returns its size in mebibytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=HIDDEN,
        intermediate_size=11 * HIDDEN // 4,
        num_hidden_layers=layers,
        num_attention_heads=HIDDEN // 64,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="200MB")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**20


def measure(model: str, rank: int) -> tuple[float, float]:
    """Seconds and mebibytes of one initialisation in this process, without a cache."""
    quiet_libraries()
    before, started = peak_memory(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        initialise(model, Path(folder) / "start", MiloraConfig(r=rank, target_modules="all-linear"))
    return time.perf_counter() - started, peak_memory() - before


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--layers", type=int, nargs="+", default=[6, 12, 24], help="(%(default)s)")
    arguments.add_argument("--rank", type=int, default=32, help="(%(default)s)")
    arguments.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    arguments.add_argument("--measure", metavar="MODEL", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    if given.measure:
        print(*measure(given.measure, given.rank))
        return
    print(machine(given.threads), flush=True)
    rows = []
    for layers in given.layers:
        with tempfile.TemporaryDirectory() as folder:
            size = write_model(Path(folder), layers)
            words = ["--measure", folder, "--rank", str(given.rank), "--threads", str(given.threads)]
            done = subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True)
        seconds, memory = map(float, done.stdout.split())
        rows.append([str(layers), f"{size:.0f} MiB", str(7 * layers), f"{seconds:.1f} s", f"{memory:.0f} MiB"])
    print(table(["layers", "checkpoint", "matrices", "time", "memory beside"], rows))


if __name__ == "__main__":
    main()
