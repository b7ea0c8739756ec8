"""Find the device for linear algebra, compare the speed of dtypes, and measure and release memory."""

import ctypes
import math
import os
import sys
import time
from functools import cache
from typing import Any

import torch

from freebits.errors import UsageError

_TRIALS = 7
_MIN_SLOWDOWN = 1.3
"""A dtype is slow if a product takes more than this many times as long as in float32. Timing noise is smaller."""


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
def is_slow(dtype: torch.dtype) -> bool:
    """Return whether this processor multiplies matrices of a 16-bit dtype more slowly than matrices of float32."""
    return _product_seconds(dtype) > _MIN_SLOWDOWN * _product_seconds(torch.float32)


def _product_seconds(dtype: torch.dtype) -> float:
    """Return the shortest measured time in seconds of a matrix product whose size is usual in text generation."""
    x, W = torch.ones(32, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    best = math.inf
    for _ in range(_TRIALS):
        start = time.perf_counter()
        torch.nn.functional.linear(x, W)
        best = min(best, time.perf_counter() - start)
    return best


@cache
def _malloc_trim() -> Any:
    """Return the function `malloc_trim` of glibc, or None if the C library is not glibc."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def release_freed_memory() -> None:
    """Return freed memory to the system. glibc would keep it in fragments that are too small for large tensors."""
    malloc_trim = _malloc_trim()
    if malloc_trim is not None:
        malloc_trim(0)


def physical_memory() -> int:
    """Return the physical memory of this machine in bytes, or 0 if it is unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
