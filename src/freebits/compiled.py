"""Compile loops for which NumPy has no operation, such as those of entropy coding, with Numba."""

from collections.abc import Callable
from functools import cache, wraps
from types import FunctionType
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function, *, any_order: bool = False) -> _Function:
    """Return a function that Numba compiles on its first call.

    Numba is also imported only then, because the import takes a second. While the compiled function runs, it releases
    the global interpreter lock. The machine code is cached on disk if there is a writable directory for it.

    The function can call other compiled functions of its file. (If they were in another file, the cache would not
    notice their changes.) Each of them keeps its own `any_order`.

    Args:
        function: a function of arrays and numbers, which are passed by position.
        any_order: whether floats may be added in any order and with fused multiply-adds. This is faster, but the last
            bits of results can then differ between machines.
    """

    @cache
    def machine_code() -> Callable[..., Any]:
        from numba import njit

        options: dict[str, Any] = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz"} if any_order else False}
        names = function.__globals__
        others = (name for name in function.__code__.co_names if isinstance(names.get(name), FunctionType))
        called = {name: names[name].machine_code() for name in others if hasattr(names[name], "machine_code")}
        compilable = FunctionType(function.__code__, names | called) if called else function
        try:
            result: Callable[..., Any] = njit(cache=True, **options)(compilable)
        except RuntimeError:  # Numba finds no writable directory for the machine code
            result = njit(**options)(compilable)
        return result

    @wraps(function)
    def call(*args: Any) -> Any:
        return machine_code()(*args)

    call.machine_code = machine_code  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]
