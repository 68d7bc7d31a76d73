"""A few commands killed at any moment; ``python tests/faults.py`` kills them by the hundred."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")
def test_commands_that_are_killed_and_started_again_end_as_if_they_had_not_been() -> None:
    script = Path(__file__).with_name("faults.py")
    words = [sys.executable, str(script), "--kills", "8"]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=1500, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    kills = [line.split(": ")[0] for line in ended.stdout.splitlines() if "SIG" in line or "full" in line]
    assert {"train", "init", "export", "prepare", "compare"} <= set(kills)
