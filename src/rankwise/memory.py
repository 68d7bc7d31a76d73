"""The most memory that the process held, and what it has freed and the C library keeps."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path


def return_free_memory() -> None:
    """Have glibc give freed memory back to the system; elsewhere, nothing.

    It keeps blocks of less than 32 MB, and what is allocated between them leaves holes that the next tensor does not
    fit into: without this the start of an adapter took as much memory as the whole model, and an idle server half more.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)


def peak_memory() -> int:
    """Most bytes that this process held so far: on the accelerator where there is one, else in main memory."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would begin with the peak of the process that started this one
        [line] = [line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
