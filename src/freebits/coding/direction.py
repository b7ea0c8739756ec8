"""The canonical direction of a matrix (paper, section 3.1 and Algorithm 1)."""

import torch
from torch import Tensor


def canonical_direction(W: Tensor) -> Tensor:
    """The rotation `Q` for which `(W Q)ᵀ (W Q)` is diagonal, ascending.

    Args:
        W: (n, k), float64, finite.

    Returns:
        (k, k), float64. Where `W` has rank `r < k`, the first `k - r` columns of `W Q` are zero.
    """
    return torch.linalg.eigh(W.T @ W).eigenvectors
