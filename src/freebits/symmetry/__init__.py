"""Moves that keep the function: norm folding and rotation at the sites."""

from freebits.symmetry.folding import fold, fold_embeddings, fold_head
from freebits.symmetry.rotation import random_orthogonal, rotate

__all__ = ["fold", "fold_embeddings", "fold_head", "random_orthogonal", "rotate"]
