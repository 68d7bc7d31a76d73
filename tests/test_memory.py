"""What is freed goes back to the system."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

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
