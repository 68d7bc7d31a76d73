"""A number of parameters instead of a threshold: the thresholds that lead there, and the support that is kept then."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor


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


class PathPoint(NamedTuple):
    """One step on the way to a budget: the optimizer's step, the threshold taken and the parameters left after it."""

    step: int
    threshold: float
    parameters: int


@dataclass
class Budget:
    """Thresholds that bring the parameters of all open directions down to a target by a given step.

    With n steps left, this one included, the threshold is ``needed_threshold / n``: were there no gradients, gates
    would meet the target in just these steps. What gradients change is corrected from step to step; the last step takes
    the rest at once, so the target is met to within one direction, and no gain has to be tuned. From then on the
    support is kept: closed gates stay closed, open ones are shrunk no more.

    Args:
        target: parameters (A, B and gates) to keep.
        steps: the optimizer step by which the target is met, 1 or more.
        path: of the thresholds so far.
        support: which gates are open, once the target is met.
    """

    target: int
    steps: int
    path: list[PathPoint] = field(default_factory=list)
    support: Bool[Tensor, " gates"] | None = None

    def threshold(self, gates: Float[Tensor, " gates"], sizes: Int[Tensor, " gates"], step: int) -> float:
        """The threshold of a step, counted from 1."""
        return needed_threshold(gates, sizes, self.target) / max(self.steps - step + 1, 1)

    def note(self, gates: Float[Tensor, " gates"], sizes: Int[Tensor, " gates"], step: int, threshold: float) -> None:
        """Keep a step's outcome; the support of the last one is the one to keep."""
        left = int(sizes[gates != 0].sum())
        self.path.append(PathPoint(step, threshold, left))
        if step >= self.steps:
            self.support = gates != 0
