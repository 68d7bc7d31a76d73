"""What language models are compared with: chance, popularity, neighbours, factors, and small sequential networks."""

from __future__ import annotations

from rankwise.recommend.baselines.simple import popularity_scores, random_scores, target_places
from rankwise.recommend.baselines.trained import BASELINES, TrainedBaseline, check_baselines
from rankwise.recommend.baselines.windows import Window

__all__ = [
    "BASELINES",
    "TrainedBaseline",
    "Window",
    "check_baselines",
    "popularity_scores",
    "random_scores",
    "target_places",
]
