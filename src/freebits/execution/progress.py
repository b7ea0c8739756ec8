"""How a long computation reports how far it is."""

from collections.abc import Callable

Progress = Callable[[str, str, int, int], None]
"""Called with the step (`calibrating`), its unit (`block`), the number of units done and of all units of the step."""


def silent(_step: str, _unit: str, _done: int, _total: int) -> None:
    """Report nothing."""
