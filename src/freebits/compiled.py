"""Functions that Numba compiles for loops that NumPy cannot run at once, such as entropy coding."""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function) -> _Function:
    """Return a function that Numba compiles on its first call, because importing Numba takes a second.

    The function releases the lock of the interpreter. Its machine code is kept on disk, if there is a directory for it.
    """

    @cache
    def machine_code() -> Callable[..., Any]:
        from numba import njit

        try:
            kept: Callable[..., Any] = njit(cache=True, nogil=True)(function)
        except RuntimeError:  # no directory is writable
            kept = njit(nogil=True)(function)
        return kept

    @wraps(function)
    def call(*args: Any) -> Any:
        return machine_code()(*args)

    return call  # type: ignore[return-value]
