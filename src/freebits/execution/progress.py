"""The callback with which long computations report progress."""

from collections.abc import Callable

Progress = Callable[[str, str, int, int], None]
"""Called with the activity (`calibrating`), its unit (`block`), the number of finished units, and the total number."""


def silent(_activity: str, _unit: str, _done: int, _total: int) -> None:
    """Report nothing."""
