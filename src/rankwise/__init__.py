"""Low-rank fine-tuning: which directions (MiLoRA), how many (SoRA), and in what order (softmax-DPO)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankwise.directions import MiloraConfig, largest_triplets, smallest_triplets
    from rankwise.exporting import ExportReport, export
    from rankwise.preferences import SoftmaxDPOConfig, SoftmaxDPOTrainer, softmax_dpo_loss
    from rankwise.ranks import SoraConfig, prune, soft_threshold, sora_optimizer
    from rankwise.recommend.recommender import Recommender
    from rankwise.recommending import load_recommender

__version__ = "0.1.0"

_HOMES = {
    "MiloraConfig": "rankwise.directions",
    "largest_triplets": "rankwise.directions",
    "smallest_triplets": "rankwise.directions",
    "SoraConfig": "rankwise.ranks",
    "prune": "rankwise.ranks",
    "soft_threshold": "rankwise.ranks",
    "sora_optimizer": "rankwise.ranks",
    "SoftmaxDPOConfig": "rankwise.preferences",
    "SoftmaxDPOTrainer": "rankwise.preferences",
    "softmax_dpo_loss": "rankwise.preferences",
    "Recommender": "rankwise.recommend.recommender",
    "load_recommender": "rankwise.recommending",
    "ExportReport": "rankwise.exporting",
    "export": "rankwise.exporting",
}

__all__ = [
    "ExportReport",
    "MiloraConfig",
    "Recommender",
    "SoftmaxDPOConfig",
    "SoftmaxDPOTrainer",
    "SoraConfig",
    "export",
    "largest_triplets",
    "load_recommender",
    "prune",
    "smallest_triplets",
    "soft_threshold",
    "softmax_dpo_loss",
    "sora_optimizer",
]


def __getattr__(name: str) -> object:
    """Import a public name's home when it is first used, so that importing rankwise is fast."""
    if name not in _HOMES:
        raise AttributeError(f"module 'rankwise' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, whether they were used before or not."""
    return sorted({*globals(), *__all__})
