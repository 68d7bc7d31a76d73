"""Names beside points: where they go."""

from __future__ import annotations

from rankwise.comparing.labels import PLACES, Box, label_places


def test_a_single_point_has_its_name_above() -> None:
    assert label_places([(3.0, 4.0)], ["lora"]) == ["top center"]
    assert label_places([], []) == []


def test_names_of_points_side_by_side_stand_apart() -> None:
    """Above the first; beside it that name would be touched, so the second goes lower, and the third below."""
    points = [(0.0, 0.0), (0.5, 0.5), (0.52, 0.5), (0.5, 0.48), (1.0, 1.0)]
    places = label_places(points, ["a", "milora", "pissa", "dora", "b"])
    assert places[1:4] == ["top center", "bottom right", "bottom center"]


def test_a_name_at_the_edge_stays_inside() -> None:
    (_, right) = label_places([(0.0, 0.5), (1.0, 0.5)], ["a", "a very long name of a method"])
    assert right.endswith("left")


def test_names_of_one_spot_take_a_place_each() -> None:
    places = label_places([(1.0, 1.0)] * len(PLACES), ["name"] * len(PLACES))
    assert len(set(places)) >= 6


def test_what_two_boxes_share() -> None:
    assert Box(0, 0, 0.5, 0.5).shared(Box(0.25, 0.25, 1, 1)) == 0.0625
    assert Box(0, 0, 0.5, 0.5).shared(Box(0.5, 0, 1, 1)) == 0
    assert Box(0.5, 0, 1.5, 1).outside == 0.5
