"""Names beside points: where they go."""

from __future__ import annotations

import random

from rankwise.comparing.labels import PLACES, Box, _box, _scaled, label_places


def test_a_single_point_has_its_name_above() -> None:
    assert label_places([(3.0, 4.0)], ["lora"]) == ["top center"]
    assert label_places([], []) == []


def test_names_of_points_side_by_side_stand_apart() -> None:
    points = [(0.0, 0.0), (0.5, 0.5), (0.52, 0.5), (1.0, 1.0)]
    names = ["a", "milora", "pissa", "b"]
    places = label_places(points, names)
    assert places[1] == "top center" and places[2] != "top center"
    across, up = (_scaled([point[axis] for point in points]) for axis in (0, 1))
    boxes = [_box(at, name, place) for at, name, place in zip(zip(across, up, strict=True), names, places, strict=True)]
    assert all(one.shared(other) == 0 for at, one in enumerate(boxes) for other in boxes[:at])


def test_a_name_at_the_edge_stays_inside() -> None:
    (_, right) = label_places([(0.0, 0.5), (1.0, 0.5)], ["a", "a very long name of a method"])
    assert right.endswith("left")


def test_any_number_of_points_on_one_spot_has_places() -> None:
    generator = random.Random(0)
    points = [(1.0, generator.choice([1.0, float("inf")])) for _ in range(30)]
    assert set(label_places(points, ["name"] * 30)) <= set(PLACES)


def test_what_two_boxes_share() -> None:
    assert Box(0, 0, 0.5, 0.5).shared(Box(0.25, 0.25, 1, 1)) == 0.0625
    assert Box(0, 0, 0.5, 0.5).shared(Box(0.5, 0, 1, 1)) == 0
    assert Box(0.5, 0, 1.5, 1).outside == 0.5
