"""Several runs, one after another, in each of several processes: `torchrun ... process_runs.py RECIPE.json ...`.

A file holds the values of a recipe; `fails` beside them is a word of the error that each process must raise, and
`starts` stands for a run of which nothing but the adapter's start is written, beside its output.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file

import small_runs
from rankwise.errors import UserError
from rankwise.methods import with_adapter
from rankwise.models import load_language_model
from rankwise.processes import Processes
from rankwise.recipes import make_recipe
from rankwise.run import Run
from rankwise.schema import Recipe


def started_model(recipe: Recipe) -> PeftModel:
    """The model with its adapter as training begins with it."""
    torch.manual_seed(recipe.seed)
    return with_adapter(load_language_model(recipe.model), recipe, "CAUSAL_LM")


def write_start(recipe: Recipe) -> None:
    """Write the factors, once."""
    processes = Processes()
    model = started_model(recipe)
    if processes.is_first:
        factors = {name: value.detach() for name, value in model.named_parameters() if "lora_" in name}
        save_file(factors, recipe.output + ".safetensors")


def main() -> None:
    for path in sys.argv[1:]:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        word, starts = values.pop("fails", None), values.pop("starts", False)
        try:
            if starts:
                write_start(make_recipe(values))
                continue
            Run(make_recipe(values), small_runs.silent())()
        except UserError as error:
            if word is None or word not in str(error):
                raise
            continue
        assert word is None, f"{path}: {word} was not told"


if __name__ == "__main__":
    main()
