"""A training step of each method on the shipped model: forward, backward, optimizer, and what the method does beside.

The time is the trainer's own over a stage of ``--steps`` steps, methods in turns; SoRA's gates and AdaLoRA's allocation
are part of it. What a method needs before its first step (a decomposition) is not. Allocating LoRA is left out: it
measures directions on held-out rows between its steps, which a whole training has to pay for.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from bench_trainer import add_sizes, model_of, ours, rows
from rankwise.errors import UserError
from rankwise.models import load_language_model, quiet_libraries
from rankwise.schema import METHODS, ModelSettings
from timing import interleaved, machine, ratio, spread

ORDER = dict.fromkeys(["lora", *METHODS])  # what the others are compared with, then all
LEFT_OUT = ("bitfit", "allocating_lora")  # the model has no biases; and as above


def main() -> None:
    """Print a table, the first method's time being what the others are compared with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=[name for name in ORDER if name not in LEFT_OUT])
    add_sizes(parser, steps=8, length=256)
    options = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(options.threads)
    print(machine(options.threads))
    vocabulary = load_language_model(ModelSettings()).config.vocab_size
    data = rows(options.steps * options.batch, options.length, vocabulary)
    parameters: dict[str, int] = {}
    for kind in options.methods:
        try:
            model = model_of(kind)
        except UserError as reason:
            print(f"{kind}: {reason}")
        else:
            parameters[kind] = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)

    if not parameters:
        parser.error("none of these methods can train the shipped model")

    def measured(kind: str) -> float:
        return ours(model_of(kind), kind, data, options.batch) / options.steps

    found = interleaved({kind: partial(measured, kind) for kind in parameters}, options.runs)
    first = next(iter(found))
    print(f"| method | parameters | ms a step | of {first} |")
    print("| --- | ---: | ---: | ---: |")
    for kind, seconds in found.items():
        milliseconds = spread([1000 * value for value in seconds], "ms", 0)
        print(f"| {kind} | {parameters[kind]:,} | {milliseconds} | {ratio(seconds, found[first])} |")


if __name__ == "__main__":
    main()
