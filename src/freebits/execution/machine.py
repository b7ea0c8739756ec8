"""Find the device for linear algebra. Measure and release the memory of this machine."""

import ctypes
import os
import sys
from functools import cache
from typing import Any

import torch

from freebits.errors import UsageError


def device_of(name: str, *, float64: bool = False) -> torch.device:
    """Return the device called `name`.

    Args:
        name: a name that PyTorch knows, such as `cuda:0`.
        float64: whether the device must support float64.

    Raises:
        UsageError: this machine cannot use the device, or `float64` is set and the device does not support float64.
    """
    try:
        device = torch.ones(1, device=name).cpu().new_empty(0, device=name).device
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"`device` {name!r} cannot be used on this machine ({reason}): choose another device"
        ) from None
    if float64 and device.type == "mps":
        raise UsageError("`device` 'mps' does not support float64, which this computation needs: omit `device`")
    return device


@cache
def _malloc_trim() -> Any:
    """Return the function `malloc_trim` of glibc, or None if the C library is not glibc."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def release_freed_memory() -> None:
    """Return freed memory to the system, because glibc keeps it in fragments too small for large tensors."""
    malloc_trim = _malloc_trim()
    if malloc_trim is not None:
        malloc_trim(0)


def physical_memory() -> int:
    """Return the memory of this machine in bytes, or 0 if it is unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
