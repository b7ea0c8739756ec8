"""Moves that keep the function: norm folding, rotation at the sites, and the canonical choice of the rotations."""

from freebits.symmetry.canonical import (
    carried_rotation,
    polar_rotation,
    projection_factor,
    shortcut_from_factor,
    triangular_rotation,
)
from freebits.symmetry.folding import fold, fold_embeddings, fold_head
from freebits.symmetry.rotation import random_orthogonal, rotate

__all__ = [
    "carried_rotation",
    "fold",
    "fold_embeddings",
    "fold_head",
    "polar_rotation",
    "projection_factor",
    "random_orthogonal",
    "rotate",
    "shortcut_from_factor",
    "triangular_rotation",
]
