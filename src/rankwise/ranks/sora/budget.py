"""A number of parameters instead of a threshold: the thresholds that lead there, and the support that is kept then."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rankwise.ranks.sora.proximal import soft_threshold


def needed_threshold(gates: Float[Tensor, " gates"], sizes: Int[Tensor, " gates"], target: int) -> float:
    """The least t for which the directions with ``|g| > t`` have at most ``target`` parameters together.

    Args:
        gates: all gates of a model.
        sizes: parameters of each gate's direction.
        target: parameters, 0 or more.

    Returns:
        0 where they have no more already, else the magnitude of the largest gate that has to go.
    """
    magnitudes, order = gates.abs().sort(descending=True)
    over = (sizes[order].cumsum(0) > target) & (magnitudes > 0)
    return float(magnitudes[over.nonzero()[0, 0]]) if over.any() else 0.0


def largest_within(gates: Float[Tensor, " gates"], sizes: Int[Tensor, " gates"], target: int) -> Bool[Tensor, " gates"]:
    """Which gates to keep: from the largest down, each whose direction still fits into ``target`` parameters.

    Of equal gates the one that stands first is taken first; closed gates are not kept.
    """
    kept, left = torch.zeros(len(gates), dtype=torch.bool), target
    costs, order = sizes.tolist(), gates.abs().sort(descending=True, stable=True).indices.tolist()
    for index in order:
        if costs[index] <= left:
            kept[index] = True
            left -= costs[index]
    fitting: Tensor = kept.to(gates.device) & (gates != 0)
    return fitting


class PathPoint(NamedTuple):
    """One step on the way to a budget: the optimizer's step, the threshold taken and the parameters left after it."""

    step: int
    threshold: float
    parameters: int


@dataclass
class Budget:
    """Thresholds that bring the parameters of all open directions down to a target by a given step.

    With n steps left, this one included, the threshold is ``needed_threshold / n``: were there no gradients, gates
    would meet the target in just these steps. What gradients change is corrected from step to step, and no gain has to
    be tuned. The last step keeps the largest gates that fit, as they are, and closes the others: the target is met to
    within one direction. From then on the support is kept: closed gates stay closed, open ones are shrunk no more.

    Args:
        target: parameters (A, B and gates) to keep.
        steps: the optimizer step by which the target is met, 1 or more.
        path: of the thresholds so far; the last step's is the size of the largest gate that it closed.
        support: which gates are open, once the target is met.
    """

    target: int
    steps: int
    path: list[PathPoint] = field(default_factory=list)
    support: Bool[Tensor, " gates"] | None = None

    def shrink(
        self, gates: Float[Tensor, " gates"], sizes: Int[Tensor, " gates"], step: int
    ) -> tuple[Float[Tensor, " gates"], float]:
        """The gates after a step, counted from 1, and the threshold that it took."""
        if self.support is not None:
            return gates * self.support, 0.0
        if step < self.steps:
            threshold = needed_threshold(gates, sizes, self.target) / (self.steps - step + 1)
            shrunk = soft_threshold(gates, threshold)
        else:
            self.support = largest_within(gates, sizes, self.target)
            shrunk = gates * self.support
            threshold = float(gates[~self.support].abs().max()) if not self.support.all() else 0.0
        self.path.append(PathPoint(step, threshold, int(sizes[shrunk != 0].sum())))
        return shrunk, threshold
