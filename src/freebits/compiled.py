"""Compile functions with Numba. They contain loops that NumPy has no operation for, such as entropy coding."""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function, *, any_order: bool = False) -> _Function:
    """Return a function that Numba compiles on its first call, because importing Numba takes a second.

    The function releases the lock of the interpreter. Its machine code is kept on disk, if there is a directory for it.

    Args:
        function: a function of arrays and numbers.
        any_order: whether sums of floats may be added in any order, which is faster.
    """

    @cache
    def machine_code() -> Callable[..., Any]:
        from numba import njit

        options: dict[str, Any] = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz"} if any_order else False}
        try:
            result: Callable[..., Any] = njit(cache=True, **options)(function)
        except RuntimeError:  # no directory is writable
            result = njit(**options)(function)
        return result

    @wraps(function)
    def call(*args: Any) -> Any:
        return machine_code()(*args)

    return call  # type: ignore[return-value]
