"""Training windows as numbers: padded rows for networks, a sparse matrix for what counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from scipy import sparse
from torch import Tensor


class Window(NamedTuple):
    """A user, some titles that the user chose one after the other, oldest first, and the title that came next."""

    user: str
    history: Sequence[str]
    target: str


class Titles:
    """The catalogue as numbers, from 0 in its order."""

    def __init__(self, titles: Sequence[str]) -> None:
        self.places = {title: place for place, title in enumerate(titles)}

    def __len__(self) -> int:
        return len(self.places)

    def known(self, history: Sequence[str]) -> list[int]:
        """Numbers of the titles that are in the catalogue; the others are passed over."""
        return [self.places[title] for title in history if title in self.places]

    def rows(self, histories: Sequence[Sequence[str]], length: int) -> Int[Tensor, "histories length"]:
        """The latest ``length`` known titles, numbered from 1, oldest first; 0 fills the rows on the left."""
        found = np.zeros((len(histories), length), dtype=np.int64)
        for row, history in enumerate(histories):
            latest = self.known(history)[-length:]
            found[row, length - len(latest) :] = np.array(latest, dtype=np.int64) + 1
        return torch.from_numpy(found)

    def targets(self, windows: Sequence[Window]) -> Int[Tensor, " windows"]:
        """Of each window, the number of what came next."""
        return torch.tensor([self.places[window.target] for window in windows], dtype=torch.long)

    def matrix(self, rows: Sequence[Sequence[str]]) -> sparse.csr_matrix:
        """1 where a row has a title, 0 elsewhere: (rows, titles), float32."""
        places = [sorted(set(self.known(row))) for row in rows]
        ends = np.cumsum([0, *map(len, places)])
        columns = np.array([place for row in places for place in row], dtype=np.int32)
        return sparse.csr_matrix((np.ones(len(columns), dtype=np.float32), columns, ends), shape=(len(rows), len(self)))


def by_user(windows: Sequence[Window]) -> list[list[str]]:
    """Of each user the titles of all windows, once each."""
    found: dict[str, dict[str, None]] = {}
    for window in windows:
        found.setdefault(window.user, {}).update(dict.fromkeys([*window.history, window.target]))
    return [list(titles) for titles in found.values()]
