"""The device that linear algebra runs on, and the memory of this machine."""

import ctypes
import os
import sys
from functools import cache
from typing import Any

import torch

from freebits.errors import UsageError


def device_of(name: str, *, float64: bool = False) -> torch.device:
    """The device called `name`.

    Args:
        name: a name that PyTorch knows, such as `cuda:0`.
        float64: whether the device must support float64.

    Raises:
        UsageError: this machine cannot use the device, or the device has no float64 although `float64` is set.
    """
    try:
        device = torch.ones(1, device=name).cpu().new_empty(0, device=name).device
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(f"`device` {name!r} cannot be used on this machine ({reason}): choose another") from None
    if float64 and device.type == "mps":
        raise UsageError("`device` 'mps' has no float64, which this computation needs: leave it out")
    return device


@cache
def _malloc_trim() -> Any:
    """The function `malloc_trim` of glibc; None with other C libraries."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def release_freed_memory() -> None:
    """Return freed memory to the system. glibc keeps it in fragments that are too small for large tensors."""
    malloc_trim = _malloc_trim()
    if malloc_trim is not None:
        malloc_trim(0)


def physical_memory() -> int:
    """Bytes of memory of this machine; 0 if unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
