"""Hostile folders. Each attack is a function that damages a copy of a valid folder. `run.py` runs commands on them."""

from collections.abc import Callable
from pathlib import Path

Attack = Callable[[Path], None]
ATTACKS: dict[str, tuple[str, Attack]] = {}
"""Name of an attack → name of the valid folder, and the function that damages a copy of it."""


def attack(base: str) -> Callable[[Attack], Attack]:
    """Return a decorator that registers an attack on copies of the valid folder `base`."""

    def register(function: Attack) -> Attack:
        ATTACKS[function.__name__] = base, function
        return function

    return register


def load_all() -> dict[str, tuple[str, Attack]]:
    """Import all modules with attacks, and return the attacks."""
    from tests.attacks import codes, configs, deltas, headers, manifests, paths  # noqa: F401  (registers the attacks)

    return ATTACKS
