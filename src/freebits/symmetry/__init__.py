"""Moves that keep the function: norm folding, rotation at the sites, and the canonical choice of the rotations."""

from freebits.symmetry.canonical import (
    Shortcut,
    carried_rotation,
    decompose,
    shortcut_from_factor,
    trapezoid,
    triangular_rotation,
)
from freebits.symmetry.folding import fold, fold_embeddings, fold_head
from freebits.symmetry.rotation import random_orthogonal, rotate

__all__ = [
    "Shortcut",
    "carried_rotation",
    "decompose",
    "fold",
    "fold_embeddings",
    "fold_head",
    "random_orthogonal",
    "rotate",
    "shortcut_from_factor",
    "trapezoid",
    "triangular_rotation",
]
