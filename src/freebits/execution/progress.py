"""The callback with which long computations report progress."""

from collections.abc import Callable

Progress = Callable[[str, str, int, int], None]
"""Called with the step (`calibrating`), its unit (`block`), the number of finished units, and the number of units."""


def silent(_step: str, _unit: str, _done: int, _total: int) -> None:
    """Report nothing."""
