"""Every reader of a file, given broken copies of sound ones: a sound result, or one clear line, in time."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz_mutations import mutated
from fuzz_targets import TARGETS, check

SLOW = ("run-results", "run-metrics", "run-ranks", "run-recipe", "comparison", "recipe")


@pytest.mark.parametrize("name", TARGETS)
def test_sound_input_is_read(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    for content in target.seeds:
        for other, bytes_ in {**target.beside, target.name: content}.items():
            (tmp_path / other).write_bytes(bytes_)
        target.read(tmp_path / target.name)


@pytest.mark.parametrize("name", TARGETS)
def test_broken_input_is_read_or_refused(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]

    @settings(
        max_examples=50 if name in SLOW else 150,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**32), st.sampled_from(target.seeds))
    def broken(seed: int, content: bytes) -> None:
        check(target, tmp_path, mutated(content, Random(seed)))

    broken()
