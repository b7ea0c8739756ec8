"""How long work tells how far it is."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with the number of steps done and of steps in all."""


def silent(_done: int, _total: int) -> None:
    """Tell nobody."""
