"""The recipe of ``rankwise demo``: the main job on a synthetic log, or on the user's own files."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

from rich.console import Console

from rankwise.errors import UserError
from rankwise.files import check_output
from rankwise.recipes import make_recipe
from rankwise.recommend.synthetic import write_synthetic
from rankwise.saying import say
from rankwise.schema import Recipe


def demo_recipe(arguments: argparse.Namespace, console: Console) -> Recipe:
    """The recipe, after writing the synthetic log where no files are given.

    Raises:
        UserError: only one of the two files is given, or no folder can be made.
    """
    if bool(arguments.ratings) != bool(arguments.items):
        raise UserError("demo needs both --ratings and --items, or neither for the synthetic log")
    output = Path(arguments.output) if arguments.output else _free(Path("runs/demo"))
    values = _values(output, arguments.seed)
    if arguments.ratings:
        values["data"] |= {"interactions": arguments.ratings, "items": arguments.items}
    else:
        check_output(output)
        folder = output.with_name(f"{output.name}-log")
        say(console, f"synthetic log, made by rankwise's own generator: {folder}")
        ratings, items = write_synthetic(folder)
        values["data"] |= {"interactions": str(ratings), "items": str(items)}
    return make_recipe(values)


def _free(folder: Path) -> Path:
    """The folder, or the first of folder-2, folder-3, ... that is not there."""
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([folder], numbered) if not path.exists())


def _values(output: Path, seed: int) -> dict[str, Any]:
    """SFT, then DPO with one negative and softmax-DPO with three, both from the SFT model."""
    preference = {"kind": "softmax_dpo", "start": "sft", "learning_rate": 1e-4, "rows": 500}
    return {
        "name": "demo",
        "adapter": {"kind": "milora", "r": 16},
        "data": {"kind": "interactions", "template": "films", "negatives": 3, "rows": 2500},
        "stages": [
            {"name": "sft", "kind": "sft", "loss": "row", "epochs": 2, "batch_size": 32, "learning_rate": 4e-3},
            {"name": "DPO-1", "negatives": 1, **preference},
            {"name": "softmax-DPO-3", "negatives": 3, **preference},
        ],
        "evaluation": {"cases": 600},
        "output": str(output),
        "seed": seed,
    }
