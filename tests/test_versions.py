"""What a result stands on."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from rankwise import versions


def told(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str | None, other: str = "") -> str:
    """The processor's name, where the system tells this of it."""
    lines = folder / "cpuinfo"
    if text is not None:
        lines.write_text(text, encoding="utf-8")
    monkeypatch.setattr(versions, "CPUINFO", lines)
    monkeypatch.setattr(platform, "processor", lambda: other)
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    return versions.processor()


@pytest.mark.parametrize(
    ("text", "other", "name"),
    [
        (
            "processor\t: 0\nmodel name\t: A 1 @ 2 GHz\n\nprocessor\t: 1\nmodel name\t: A 1 @ 2 GHz\n",
            "x",
            "A 1 @ 2 GHz",
        ),
        ("processor\t: 0\nBogoMIPS\t: 50.00\n", "arm", "arm"),  # not all systems tell it there
        ("model name\t:\n", "", "riscv64"),
        (None, "i386", "i386"),
        (None, "", "riscv64"),
    ],
)
def test_a_processor_has_the_name_that_the_system_gives_it(
    text: str | None, other: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert told(monkeypatch, tmp_path, text, other) == name


def test_what_was_another_then() -> None:
    then, now = {"torch": "2.12.0", "numpy": "2", "gone": "1"}, {"torch": "2.13.0", "numpy": "2", "new": "1"}
    assert versions.differing(then, now) == {"torch": ("2.12.0", "2.13.0")}


def test_of_several_results_what_they_do_not_share_is_counted() -> None:
    found = [{"torch": "1", "numpy": "2"}, {"torch": "3", "numpy": "2"}, {"torch": "3", "numpy": "2"}]
    assert versions.mixed(found) == {"torch": {"3": 2, "1": 1}}
    assert versions.mixed([*found[1:], {}]) == {}
    assert versions.mixed([{}, {}]) == {} == versions.mixed([])
