"""Where the names of a figure's points go, so that they stand apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

LETTER, LINE, MARK = 0.016, 0.055, 0.02  # of a figure's width, and of its height
PLACES = (
    *("top center", "bottom center", "middle right", "middle left"),
    *("top right", "top left", "bottom right", "bottom left"),
)
Point = tuple[float, float]


class Box(NamedTuple):
    """A part of a figure, from (0, 0) to (1, 1)."""

    left: float
    bottom: float
    right: float
    top: float

    def shared(self, other: Box) -> float:
        """The area that lies in both."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(0.0, width) * max(0.0, height)

    @property
    def outside(self) -> float:
        """The area that lies in no figure."""
        return (self.right - self.left) * (self.top - self.bottom) - self.shared(Box(0, 0, 1, 1))


def label_places(points: Sequence[Point], names: Sequence[str]) -> list[str]:
    """Plotly's ``textposition`` of each point's name, one after the other where least of it is covered.

    Args:
        points: in the units of linear axes.
        names: of the points.
    """
    at = list(zip(*(_scaled([point[axis] for point in points]) for axis in (0, 1)), strict=True))
    taken = [Box(x - MARK / 2, y - MARK / 2, x + MARK / 2, y + MARK / 2) for x, y in at]
    found = []
    for point, name in zip(at, names, strict=True):
        boxes = {place: _box(point, name, place) for place in PLACES}
        covered = {place: sum(map(box.shared, taken)) + box.outside for place, box in boxes.items()}
        best = min(PLACES, key=lambda place: covered[place])
        taken.append(boxes[best])
        found.append(best)
    return found


def _scaled(values: Sequence[float]) -> list[float]:
    """Into the middle nine tenths of 0 to 1."""
    low, high = (pick(values, default=0.0) for pick in (min, max))
    span = high - low
    return [0.05 + 0.9 * ((value - low) / span if span else 0.5) for value in values]


def _box(point: Point, name: str, place: str) -> Box:
    """Of the name at a place beside its point."""
    vertical, horizontal = place.split()
    width, height = LETTER * len(name), LINE
    left = point[0] + {"left": -width - MARK, "center": -width / 2, "right": MARK}[horizontal]
    bottom = point[1] + {"bottom": -height - MARK, "middle": -height / 2, "top": MARK}[vertical]
    return Box(left, bottom, left + width, bottom + height)
