"""Baselines on logs whose best recommendations are known, and against independent computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rankwise.errors import UserError
from rankwise.recommend.baselines import sequential
from rankwise.recommend.baselines.counting import ItemNeighbours, MatrixFactorisation
from rankwise.recommend.baselines.networks import Caser, GRU4Rec, NextTitle, SASRec
from rankwise.recommend.baselines.trained import BASELINES, TrainedBaseline
from rankwise.recommend.baselines.windows import Titles, Window, by_user

CIRCLE = [f"film {number}" for number in range(12)]
NETWORKS = ("gru4rec", "caser", "sasrec")
BLUE, RED = [f"blue {number}" for number in range(6)], [f"red {number}" for number in range(6)]


def circle(count: int, seed: int) -> list[Window]:
    """Each film is followed by the next one; the last by the first."""
    generator = np.random.default_rng(seed)
    found = []
    for user in range(count):
        start, length = generator.integers(12), generator.integers(1, 6)
        titles = [CIRCLE[(start + step) % 12] for step in range(length + 1)]
        found.append(Window(f"u{user}", titles[:-1], titles[-1]))
    return found


def two_groups(seed: int = 0) -> list[Window]:
    """Some users watch blue films, the others red ones."""
    generator = np.random.default_rng(seed)
    picked = [generator.choice(group, 4, replace=False).tolist() for group in (BLUE, RED) for _ in range(200)]
    return [Window(f"u{user}", titles[:-1], titles[-1]) for user, titles in enumerate(picked)]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_learns_what_follows_what(name: str) -> None:
    made = TrainedBaseline(name, CIRCLE).fit(circle(500, 0), circle(100, 1))
    held_out = circle(50, 2)
    best = made.scores([window.history for window in held_out]).argmax(axis=1)
    assert [CIRCLE[place] for place in best] == [window.target for window in held_out]


@pytest.mark.parametrize("name", ["item-knn", "als", *NETWORKS])
def test_the_own_group_comes_first(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MatrixFactorisation, "factors", 2)  # more would keep each user's films apart
    made = TrainedBaseline(name, [*BLUE, *RED]).fit(two_groups(), two_groups(1))
    for history, own in (([BLUE[0], BLUE[3]], range(6)), ([RED[5]], range(6, 12))):
        [scores] = made.scores([history])
        others = [place for place in range(12) if place not in own]
        unseen = [place for place in own if [*BLUE, *RED][place] not in history]
        assert scores[unseen].min() > scores[others].max()


def test_neighbours_are_those_of_a_dense_computation() -> None:
    windows, titles = two_groups(), Titles([*BLUE, *RED, "never chosen"])
    made = ItemNeighbours(titles).fit(windows)
    dense = np.array([[title in row for title in titles.places] for row in by_user(windows)], dtype=float)
    norms = np.sqrt(np.maximum(dense.sum(axis=0), 1))
    cosine = dense.T @ dense / norms / norms[:, None]
    np.fill_diagonal(cosine, 0)
    history = [BLUE[1], RED[2], RED[4]]
    [scores] = made.scores([history])
    np.testing.assert_allclose(scores, cosine[[titles.places[one] for one in history]].sum(axis=0), atol=1e-6)


def test_factors_of_a_history_solve_the_weighted_least_squares() -> None:
    titles = Titles([*BLUE, *RED])
    made = MatrixFactorisation(titles, seed=3).fit(two_groups())
    history = [BLUE[1], RED[2]]
    items = made.model.item_factors.astype(float)
    chosen = np.array([title in history for title in titles.places], dtype=float)
    weights = np.diag(np.where(chosen == 1, made.alpha, 1.0))
    normal = items.T @ weights @ items + made.regularisation * np.eye(items.shape[1])
    factors = np.linalg.solve(normal, items.T @ weights @ chosen)
    [scores] = made.scores([history])
    np.testing.assert_allclose(scores, items @ factors, atol=1e-3)


@pytest.mark.parametrize("network", [GRU4Rec, Caser, SASRec])
def test_filling_changes_nothing(network: type[NextTitle]) -> None:
    """A row of 6 places whose first are filled gives what the same titles give beside rows of any other length."""
    torch.manual_seed(0)
    model = network(9, 6).eval()
    short, long = [0, 0, 0, 2, 5, 1], [3, 1, 4, 9, 2, 6]
    alone, beside = model(torch.tensor([short])), model(torch.tensor([long, short]))
    torch.testing.assert_close(alone[0], beside[1])
    with torch.no_grad():
        model.embedding.weight[0] = 1e3 if network is SASRec else 0.0  # attention never sees the filling
    torch.testing.assert_close(model(torch.tensor([short])), alone)


def test_a_recurrent_state_is_that_of_the_titles_alone() -> None:
    torch.manual_seed(0)
    model = GRU4Rec(9, 6).eval()
    _, last = model.recurrent(model.embedding(torch.tensor([[2, 5, 1]])))
    torch.testing.assert_close(model.read(torch.tensor([[0, 0, 0, 2, 5, 1]])), model.last(last[0]))


def test_attention_sees_no_later_title() -> None:
    torch.manual_seed(0)
    model = SASRec(9, 6).eval()
    one, other = model.states(torch.tensor([[0, 3, 1, 4, 9, 2]])), model.states(torch.tensor([[0, 3, 1, 4, 8, 7]]))
    torch.testing.assert_close(one[:, 1:4], other[:, 1:4])
    assert not torch.allclose(one[:, 4], other[:, 4])


def test_convolutions_are_those_of_a_plain_loop() -> None:
    torch.manual_seed(0)
    model = Caser(9, 4).eval()
    row = torch.tensor([[0, 3, 1, 4]])
    image = model.embedding(row)[0]
    found = []
    for height, layer in enumerate(model.across, start=1):
        windows = torch.stack([image[start : start + height] for start in range(4 - height + 1)])
        values = torch.einsum("whd,chd->wc", windows, layer.weight[:, 0]) + layer.bias
        found.append(values.relu().amax(dim=0))
    along = torch.einsum("ld,cl->cd", image, model.along.weight[:, 0, :, 0]) + model.along.bias[:, None]
    expected = model.last(torch.cat([along.flatten(), *found]))
    torch.testing.assert_close(model.read(row)[0], expected)


@pytest.mark.parametrize("name", BASELINES)
def test_the_seed_says_all(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequential, "EPOCHS", 2)
    titles = [*BLUE, *RED]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, other = (TrainedBaseline(name, titles, 7).fit(two_groups(), two_groups(1)) for _ in range(2))
    np.testing.assert_array_equal(one.scores([[RED[1]]]), other.scores([[RED[1]]]))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", BASELINES)
def test_titles_and_histories_that_nothing_is_known_of(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequential, "EPOCHS", 2)
    titles = [*BLUE, *RED, "never chosen"]
    windows = [*two_groups(), Window("u99", [BLUE[0]], "not in the catalogue")]
    made = TrainedBaseline(name, titles).fit(windows, two_groups(1))
    popular = [sum(title in row for row in by_user(windows[:-1])) for title in titles]
    known, part, new, empty = made.scores([[RED[1]], ["new", RED[1]], ["new"], []])
    np.testing.assert_allclose(known, part)
    np.testing.assert_array_equal([new, empty], [popular, popular])
    assert made.counts == {"windows left out": 1, "histories without a known title": 2}


@pytest.mark.parametrize("name", BASELINES)
def test_a_catalogue_of_one(name: str) -> None:
    windows = [Window("u1", ["only"], "only")]
    made = TrainedBaseline(name, ["only"]).fit(windows, windows)
    assert made.scores([["only"]]).shape == (1, 1)


def test_what_makes_no_sense_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="'bpr' is no baseline: choose from item-knn, als"):
        TrainedBaseline("bpr", CIRCLE)
    with pytest.raises(UserError, match="the catalogue is empty"):
        TrainedBaseline("als", [])
    with pytest.raises(UserError, match="0 training and 100 validation windows"):
        TrainedBaseline("sasrec", CIRCLE).fit([], circle(100, 1))
    monkeypatch.setattr(Caser, "read", lambda self, rows: self.last.weight.new_full((len(rows), 64), float("nan")))
    with pytest.raises(UserError, match="the validation loss of Caser is nan after 1 passes"):
        TrainedBaseline("caser", CIRCLE).fit(circle(500, 0), circle(10, 1))
