"""Means over rows, of all processes: between two logs of a training, and of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MEANS_FILE = "means-{}.safetensors"  # in a checkpoint, of each process


class RunningMeans:
    """Sums of measures with one value a row; they stay on the device until they are asked for."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._rows = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add rows; each measure is (rows,)."""
        self._rows += len(next(iter(values.values())))
        for name, value in values.items():
            total = value.double().sum() if value.device.type != "mps" else value.sum()
            self._sums[name] = self._sums[name] + total if name in self._sums else total

    def state(self) -> dict[str, Any]:
        """What was added since the last :meth:`take`."""
        return {"sums": dict(self._sums), "rows": self._rows}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from what :meth:`state` returned."""
        self._sums = {name: value.to(device) for name, value in state["sums"].items()}
        self._rows = state["rows"]

    def take(self, add_up: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means since the last call, or nothing where no row was added.

        Args:
            add_up: adds a tensor up over processes; called by all of them or by none.
        """
        if not self._rows:
            return {}
        rows = torch.full_like(next(iter(self._sums.values())), self._rows)
        *totals, count = add_up(torch.stack([*self._sums.values(), rows])).tolist()
        names, self._sums, self._rows = list(self._sums), {}, 0
        return {name: total / count for name, total in zip(names, totals, strict=True)}


class RowMeans:
    """Measures of an evaluation, kept by row: several processes are given some rows twice, to have equally many.

    Args:
        rows: how many there are to evaluate.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._sums: dict[str, Tensor] = {}

    def add(self, places: Sequence[int], values: Mapping[str, Tensor]) -> None:
        """Add the rows at these places of the evaluation; each measure is (rows,)."""
        for name, value in {**values, "": torch.ones_like(next(iter(values.values())))}.items():
            total = self._sums.setdefault(name, torch.zeros(self.rows, dtype=value.dtype, device=value.device))
            total.index_add_(0, torch.tensor(places, device=value.device), value)

    def take(self, add_up: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means since the last call over the rows that were added, or nothing where none was.

        Args:
            add_up: as above.
        """
        if not self._sums:
            return {}
        names = [name for name in self._sums if name]
        totals = add_up(torch.stack([*(self._sums[name] for name in names), self._sums[""]]))
        seen = totals[-1] > 0
        means = (totals[:-1, seen] / totals[-1, seen]).cpu().double().mean(dim=1).tolist()  # MPS has no float64
        self.clear()
        return dict(zip(names, means, strict=True))

    def clear(self) -> None:
        """Forget what was added."""
        self._sums = {}
