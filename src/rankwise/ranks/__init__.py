"""How many directions? Gates that become sparse while training, and the pruning that follows."""

from rankwise.ranks.adalora import AdaloraAllocation, adalora_ranks
from rankwise.ranks.adalora_callback import AdaloraCallback
from rankwise.ranks.allocation import importance
from rankwise.ranks.allocation_callback import AllocationCallback
from rankwise.ranks.budget import Budget, needed_threshold
from rankwise.ranks.gate_steps import AllGatesClosed, GateSteps
from rankwise.ranks.optimizer import (
    SoraCallback,
    attach_proximal_step,
    attached_steps,
    optimizer_factory,
    sora_optimizer,
)
from rankwise.ranks.orthogonality import orthogonality
from rankwise.ranks.proximal import published_step, soft_threshold
from rankwise.ranks.pruning import PruneReport, prune
from rankwise.ranks.resizing import resize_adapter
from rankwise.ranks.restoring import match_ranks
from rankwise.ranks.schedule import rising_thresholds
from rankwise.ranks.sora import gate_counts, gates
from rankwise.ranks.sora_config import SoraConfig

__all__ = [
    "AdaloraAllocation",
    "AdaloraCallback",
    "AllGatesClosed",
    "AllocationCallback",
    "Budget",
    "GateSteps",
    "PruneReport",
    "SoraCallback",
    "SoraConfig",
    "adalora_ranks",
    "attach_proximal_step",
    "attached_steps",
    "gate_counts",
    "gates",
    "importance",
    "match_ranks",
    "needed_threshold",
    "optimizer_factory",
    "orthogonality",
    "prune",
    "published_step",
    "resize_adapter",
    "rising_thresholds",
    "soft_threshold",
    "sora_optimizer",
]
