"""Folders made to do harm: each function turns a sound one into one. `run.py` gives them to every verb."""

from collections.abc import Callable
from pathlib import Path

Attack = Callable[[Path], None]
ATTACKS: dict[str, tuple[str, Attack]] = {}
"""Name → the sound folder it begins with, and what it does to a copy."""


def attack(base: str) -> Callable[[Attack], Attack]:
    """Register a function that spoils a folder of that kind."""

    def register(function: Attack) -> Attack:
        ATTACKS[function.__name__] = base, function
        return function

    return register


def load_all() -> dict[str, tuple[str, Attack]]:
    """Every attack."""
    from tests.attacks import codes, configs, headers, manifests, paths  # noqa: F401  (they register themselves)

    return ATTACKS
