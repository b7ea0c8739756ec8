"""Where linear algebra runs."""

import ctypes
import os
import sys
from functools import cache
from typing import Any

import torch

from freebits.errors import UsageError


def device_of(name: str, *, float64: bool = False) -> torch.device:
    """The device of that name.

    Raises:
        UsageError: there is none on this machine, or it has no float64 where that is needed.
    """
    try:
        device = torch.ones(1, device=name).cpu().new_empty(0, device=name).device
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        finding = str(error).strip().partition("\n")[0]
        raise UsageError(f"device {name!r} cannot be used here ({finding})") from None
    if float64 and device.type == "mps":
        raise UsageError("device 'mps' has no float64, in which this is computed: leave out --device")
    return device


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
