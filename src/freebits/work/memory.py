"""The machine's memory, and memory that the process has freed."""

import ctypes
import os
import sys
from functools import cache
from typing import Any


@cache
def _trim() -> Any:
    """The C library's function, where it has one: only glibc does."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def release_freed_memory() -> None:
    """Give freed memory back. glibc keeps it between allocations that live on, where large ones no longer fit."""
    trim = _trim()
    if trim is not None:
        trim(0)


def physical_memory() -> int:
    """Bytes of memory that the machine has; 0 where that is not known."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
