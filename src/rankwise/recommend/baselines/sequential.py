"""One training loop for the sequential networks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rankwise.errors import UserError
from rankwise.recommend.baselines.networks import NextTitle
from rankwise.recommend.baselines.windows import Titles, Window

BATCH, RATE, EPOCHS, PATIENCE = 256, 1e-3, 100, 3
LONGEST = 50  # titles of a history that a network reads, at most


class Sequential:
    """A network trained to name the next title.

    Cross-entropy over the whole catalogue, Adam, batches of 256 in an order of the seed's; training ends where the
    validation windows' cross-entropy has not fallen for 3 passes, and the weights of its lowest value are kept.

    Args:
        network: makes the network of a number of titles and a length.
        titles: the catalogue.
        seed: of weights, order and dropout.
    """

    def __init__(self, network: Callable[[int, int], NextTitle], titles: Titles, seed: int = 0) -> None:
        self.network, self.titles, self.seed = network, titles, seed

    def fit(self, train: Sequence[Window], validation: Sequence[Window]) -> Sequential:
        """Train.

        Raises:
            UserError: there is no window to train on, none to stop by, or the loss is no number.
        """
        if not train or not validation:
            raise UserError(
                f"{len(train)} training and {len(validation)} validation windows: give at least one of each"
            )
        self.length = min(LONGEST, max(len(window.history) for window in train))
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self.model = self.network(len(self.titles), self.length).to(torch.get_default_device())
            self.passes = self._train(self._encoded(train), self._encoded(validation))
        self.model.eval()
        return self

    @torch.no_grad()
    def scores(self, histories: Sequence[Sequence[str]]) -> Float[np.ndarray, "histories titles"]:
        """Of each history and title, higher is better."""
        device = next(self.model.parameters()).device
        rows = self.titles.rows(histories, self.length).to(device)
        return torch.cat([self.model(part) for part in torch.split(rows, BATCH)]).double().cpu().numpy()

    def _encoded(self, windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
        device = next(self.model.parameters()).device
        rows = self.titles.rows([window.history for window in windows], self.length)
        return rows.to(device), self.titles.targets(windows).to(device)

    def _train(self, train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor]) -> int:
        """Passes over the training windows until the best weights."""
        optimizer = torch.optim.Adam(self.model.parameters(), lr=RATE)
        best, best_pass, state = float("inf"), 0, copy.deepcopy(self.model.state_dict())
        for epoch in range(1, EPOCHS + 1):
            self.model.train()
            for rows, targets in _shuffled(*train):
                loss = nn.functional.cross_entropy(self.model(rows), targets)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            found = self._loss(*validation)
            if not np.isfinite(found):
                raise UserError(f"the validation loss of {type(self.model).__name__} is {found} after {epoch} passes")
            if found < best:
                best, best_pass, state = found, epoch, copy.deepcopy(self.model.state_dict())
            elif epoch - best_pass >= PATIENCE:
                break
        self.model.load_state_dict(state)
        return best_pass

    @torch.no_grad()
    def _loss(self, rows: Int[Tensor, "windows length"], targets: Int[Tensor, " windows"]) -> float:
        self.model.eval()
        parts = zip(torch.split(rows, BATCH), torch.split(targets, BATCH), strict=True)
        total = sum(float(nn.functional.cross_entropy(self.model(one), goal, reduction="sum")) for one, goal in parts)
        return total / len(targets)


def _shuffled(
    rows: Int[Tensor, "windows length"], targets: Int[Tensor, " windows"]
) -> Iterator[tuple[Int[Tensor, "some length"], Int[Tensor, " some"]]]:
    order = torch.randperm(len(targets), device="cpu").to(targets.device)
    for picked in torch.split(order, BATCH):
        yield rows[picked], targets[picked]
