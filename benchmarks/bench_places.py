"""How long it takes to look where updates lie, and what memory: a model of GPT-2's shape with random weights and LoRA.

    python benchmarks/bench_places.py

`rankwise.analysis.places.update_places` decomposes each weight, and each weight with its update, once. Memory is the
largest resident memory of the process, less what it was before, beside the largest weight.
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from rankwise.analysis.places import update_places
from rankwise.memory import return_free_memory
from timing import forget_peak, machine, peak_memory, seconds


def main() -> None:
    """Print time and memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument(
        "--rank", type=int, default=16, help="of the adapter, and directions of each part (%(default)s)"
    )
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    heads = max(1, options.width // 64)
    base = GPT2LMHeadModel(GPT2Config(n_layer=options.layers, n_embd=options.width, n_head=heads))
    model = get_peft_model(base, LoraConfig(r=options.rank, target_modules="all-linear", init_lora_weights=False))
    return_free_memory()
    forget_peak()
    before = peak_memory()
    found = []
    took = seconds(lambda: found.append(update_places(model, options.rank)))
    [(rows, _)] = found
    weights = [module.base_layer.weight for module in model.modules() if hasattr(module, "base_layer")]
    looked_at, largest = sum(map(torch.numel, weights)), max(map(torch.numel, weights)) * 4 / 2**20
    print(machine(options.threads))
    print(
        f"{len(rows)} matrices, {looked_at:,} weights: {took:.1f} s, {100e6 * took / looked_at:.1f} s for 100 million;"
    )
    added = peak_memory() - before
    print(f"{added:.0f} MiB added, {added / largest:.1f} times the largest weight of {largest:.1f} MiB")


if __name__ == "__main__":
    main()
