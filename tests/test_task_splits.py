from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.errors import UserError
from rankwise.tasks.splits import hold_out


@given(total=st.integers(2, 200), seed=st.integers(0, 5), data=st.data())
def test_every_row_is_in_exactly_one_part(total: int, seed: int, data: st.DataObject) -> None:
    held = data.draw(st.integers(1, total - 1))
    train, validation = hold_out(range(total), held, seed)
    assert len(validation) == held
    assert sorted(train + validation) == list(range(total))
    assert train == sorted(train)
    assert validation == sorted(validation)


@pytest.mark.parametrize(("total", "share", "number"), [(100, 0.1, 10), (10, 0.01, 1), (7, 0.5, 4), (2, 0.5, 1)])
def test_a_share_is_rounded_to_at_least_one_row(total: int, share: float, number: int) -> None:
    assert len(hold_out(range(total), share, 0)[1]) == number


def test_the_seed_alone_decides() -> None:
    rows = [f"row {number}" for number in range(50)]
    assert hold_out(rows, 5, 1) == hold_out([*rows], 5, 1)
    assert hold_out(rows, 5, 1) != hold_out(rows, 5, 2)


def test_the_drawn_rows_stay_the_same_over_versions() -> None:
    # sha256 of "7:0" ... "7:9", ranked: worked out once with `printf 7:0 | sha256sum` and so on.
    assert hold_out(range(10), 3, 7)[1] == [3, 4, 7]


def test_fewer_held_rows_are_among_the_more() -> None:
    assert set(hold_out(range(100), 5, 3)[1]) < set(hold_out(range(100), 20, 3)[1])


@pytest.mark.parametrize("held", [0, -1, 10, 11, 0.0, 1.0, -0.1, 1.5, 0.99, float("nan")])
def test_an_empty_part_is_refused(held: float | int) -> None:
    with pytest.raises(UserError, match=r"at least one|between 0 and 1"):
        hold_out(range(10), held, 0)


@pytest.mark.parametrize("rows", [[], ["only"]])
def test_too_few_rows(rows: list[str]) -> None:
    with pytest.raises(UserError, match="both parts need at least one"):
        hold_out(rows, 0.5, 0)
