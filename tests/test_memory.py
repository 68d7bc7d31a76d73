"""What is freed goes back to the system, and the most that was held is told on any."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from rankwise.memory import peak_memory

HOLES = """
import ctypes, json, re
from pathlib import Path
from rankwise.memory import return_free_memory

library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.malloc.argtypes, library.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]

def taken(megabytes):
    block = library.malloc(megabytes << 20)
    ctypes.memset(block, 1, megabytes << 20)
    return block

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

library.free(taken(30))  # from here on, glibc keeps blocks of up to this size
blocks, between = [], []
for _ in range(20):
    blocks.append(taken(8))
    between.append(taken(1))
for block in blocks:
    library.free(block)
kept = resident()
return_free_memory()
print(json.dumps(kept - resident()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the resident size is read as Linux tells it")
def test_blocks_between_others_are_returned() -> None:
    ended = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == pytest.approx(160, abs=20)


def test_the_most_memory_is_told_where_there_is_no_proc_and_no_resource(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows."""
    monkeypatch.setattr("rankwise.memory.Path", lambda _: Path("nowhere"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "resource", None)
    seen = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=12345))
    monkeypatch.setattr(psutil, "Process", lambda: seen)
    assert peak_memory() == 12345
