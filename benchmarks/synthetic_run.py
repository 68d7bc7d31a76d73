"""A run on a synthetic log, for benchmarks of what is done with a finished one."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from rankwise.recipes import make_recipe
from rankwise.recommend.synthetic import write_synthetic
from rankwise.run import Run


def make_run(folder: Path) -> Path:
    """A run that takes seconds: a few rows of SFT and of softmax-DPO."""
    ratings, items = write_synthetic(folder / "log")
    stage = {"kind": "softmax_dpo", "start": "sft", "rows": 16, "negatives": 3}
    values = {
        "name": "served",
        "adapter": {"kind": "lora", "r": 16},
        "data": {"kind": "interactions", "interactions": str(ratings), "items": str(items), "rows": 64, "negatives": 3},
        "stages": [{"name": "sft", "kind": "sft", "epochs": 1}, {"name": "softmax-DPO", **stage}],
        "evaluation": {"cases": 4, "base": False, "generate": False},
        "output": str(folder / "run"),
    }
    Run(make_recipe(values), Console(file=io.StringIO()))()
    return folder / "run"
