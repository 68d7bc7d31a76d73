"""Memory that the process has freed, and that the C library keeps."""

from __future__ import annotations

import ctypes
import sys


def return_free_memory() -> None:
    """Have glibc give freed memory back to the system; elsewhere, nothing.

    It keeps blocks of less than 32 MB, and what is allocated between them leaves holes that the next tensor does not
    fit into: without this the start of an adapter took as much memory as the whole model, and an idle server half more.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)
