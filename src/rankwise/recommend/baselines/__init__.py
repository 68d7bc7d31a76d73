"""What language models are compared with: chance, popularity, neighbours, factors, and small sequential networks."""

from __future__ import annotations

from rankwise.recommend.baselines.simple import popularity_scores, random_scores, target_places
from rankwise.recommend.baselines.trained import BASELINES, Baseline, check_baselines, make_baseline
from rankwise.recommend.baselines.windows import Window

__all__ = [
    "BASELINES",
    "Baseline",
    "Window",
    "check_baselines",
    "make_baseline",
    "popularity_scores",
    "random_scores",
    "target_places",
]
