"""How many directions? SoRA's gates, budgets and pruning; AdaLoRA and allocating LoRA; ranks that change in place."""

from rankwise.ranks.adalora.allocation import AdaloraAllocation, adalora_ranks
from rankwise.ranks.adalora.callback import AdaloraCallback
from rankwise.ranks.adalora.orthogonality import orthogonality
from rankwise.ranks.allocating.allocation import importance
from rankwise.ranks.allocating.callback import AllocationCallback
from rankwise.ranks.resizing import resize_adapter
from rankwise.ranks.restoring import match_ranks
from rankwise.ranks.sora.budget import Budget, needed_threshold
from rankwise.ranks.sora.config import SoraConfig
from rankwise.ranks.sora.gate_steps import AllGatesClosed, GateSteps
from rankwise.ranks.sora.layer import gate_counts, gates
from rankwise.ranks.sora.optimizer import (
    SoraCallback,
    attach_proximal_step,
    attached_steps,
    optimizer_factory,
    sora_optimizer,
)
from rankwise.ranks.sora.proximal import published_step, soft_threshold
from rankwise.ranks.sora.pruning import PruneReport, prune
from rankwise.ranks.sora.schedule import rising_thresholds

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
