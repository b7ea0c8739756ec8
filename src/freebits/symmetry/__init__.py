"""What keeps the function: norm folding, rotation at the sites, and the canonical form of shortcuts."""

from freebits.symmetry.folding import fold_embeddings, fold_head, fold_sublayers
from freebits.symmetry.hadamard import hadamard, hadamard_inverse
from freebits.symmetry.orthogonal import random_orthogonal, rotate
from freebits.symmetry.pivoting import act, pivot_bases, pivot_rows
from freebits.symmetry.polar import (
    PolarForm,
    carried_rotation,
    polar_form,
    shortcut_from_factor,
    trapezoid,
    triangular_rotation,
)

__all__ = [
    "PolarForm",
    "act",
    "carried_rotation",
    "fold_embeddings",
    "fold_head",
    "fold_sublayers",
    "hadamard",
    "hadamard_inverse",
    "pivot_bases",
    "pivot_rows",
    "polar_form",
    "random_orthogonal",
    "rotate",
    "shortcut_from_factor",
    "trapezoid",
    "triangular_rotation",
]
