"""How many directions? Gates that become sparse while training, and the pruning that follows."""

from rankwise.ranks.proximal import attach_proximal_step, published_step, soft_threshold, sora_optimizer
from rankwise.ranks.pruning import PruneReport, prune
from rankwise.ranks.resizing import resize_adapter
from rankwise.ranks.sora import SoraConfig, gate_counts, gates

__all__ = [
    "PruneReport",
    "SoraConfig",
    "attach_proximal_step",
    "gate_counts",
    "gates",
    "prune",
    "published_step",
    "resize_adapter",
    "soft_threshold",
    "sora_optimizer",
]
