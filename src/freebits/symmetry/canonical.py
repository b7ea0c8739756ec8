"""The canonical form: rotations chosen so that little is left to store, instead of storing which they are.

Row-vector convention: `x ↦ x A` with a shortcut `A: (k, k')` from site `s - 1` to site `s`. Rotating the sites by
`G` turns `A` into `G₋ᵀ A G`. Slicing leaves `A = Q₋ᵀ Q`, a corner of an orthogonal matrix: but for at most `D - k'` its
singular values are 1. Its polar decomposition `A = P [I 0] R` shows the choice: with `G = Rᵀ (G₋ ⊕ I)` the shortcut
becomes `[G₋ᵀ P G₋, 0]`, symmetric, and as all but a few of its eigenvalues are 1, `I - M Mᵀ` with a thin `M`. `M` is
free up to a rotation of its columns, which makes it lower trapezoidal. One rotation is left, of site 0.
"""

import torch
from torch import Tensor


def polar_rotation(A: Tensor) -> Tensor:
    """`R: (k', k')`, orthogonal, with `A = P [I 0] R` and `P` symmetric positive semidefinite.

    Args:
        A: (k, k') with k ≤ k', float64, finite.
    """
    U, _, Vh = torch.linalg.svd(A, full_matrices=True)
    return torch.cat([U @ Vh[: len(A)], Vh[len(A) :]])


def carried_rotation(G: Tensor, R: Tensor) -> Tensor:
    """`G' = Rᵀ (G ⊕ I): (k', k')`, with which `Gᵀ A G' = [Gᵀ P G, 0]`; see `polar_rotation`."""
    return torch.cat([R[: len(G)].T @ G, R[len(G) :].T], dim=1)


def triangular_rotation(W: Tensor) -> Tensor:
    """The rotation `G: (k, k)` that makes `W G` lower trapezoidal with a diagonal of no negative number.

    Args:
        W: (n, k), float64, finite.
    """
    Q, R = torch.linalg.qr(W[: W.shape[1]].T, mode="complete")
    negative = torch.zeros(len(Q), dtype=torch.bool)
    negative[: R.shape[1]] = R.diagonal() < 0
    return torch.where(negative, -Q, Q)


def projection_factor(P: Tensor, tolerance: float) -> Tensor | None:
    """`M: (k, r)`, lower trapezoidal, with `P = I - M Mᵀ` and as few columns as that takes.

    Args:
        P: (k, k), float64, symmetric.
        tolerance: how far from 1 an eigenvalue may lie and count as 1: what rounding did to the shortcut.

    Returns:
        None if `P` has no such structure: an eigenvalue lies above 1, or all of them below.
    """
    values, vectors = torch.linalg.eigh(P)
    removed = 1 - values > tolerance
    if removed.all() or (values - 1 > tolerance).any():
        return None
    M = vectors[:, removed] * (1 - values[removed]).clamp(max=1).sqrt()
    R = torch.linalg.qr(M.T).R.T
    return torch.where(R.diagonal() < 0, -R, R)


def shortcut_from_factor(M: Tensor, width: int) -> Tensor:
    """`[I - M Mᵀ, 0]` as `nn.Linear` stores it, (width, k), float64."""
    wide = M.double()
    dense = torch.zeros(width, len(M), dtype=torch.float64)
    dense[: len(M)] = torch.eye(len(M), dtype=torch.float64) - wide @ wide.T
    return dense
