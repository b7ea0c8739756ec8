"""The canonical form of shortcuts: rotations chosen so that little is left to store, instead of storing which they are.

Row-vector convention: `x ↦ x A` with a shortcut `A: (k, k')` from site `s - 1` to site `s`. Rotating the sites by
`G` turns `A` into `G₋ᵀ A G`. Slicing leaves `A = Q₋ᵀ Q`, a corner of an orthogonal matrix: but for at most `D - k'` its
singular values are 1. Its polar decomposition `A = P [I 0] R` shows the choice: with `G = Rᵀ (G₋ ⊕ I)` the shortcut
becomes `[G₋ᵀ P G₋, 0]`, symmetric, and as all but a few of its eigenvalues are 1, `I - M Mᵀ` with a thin `M`. `M` is
free up to a rotation of its columns, which makes it lower trapezoidal. One rotation is left, of site 0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST = 1e-6
"""A singular value below it is lost in the square of the matrix."""
_STEPS, _NEAR, _EQUAL = 5, 0.5, 1e-15


@dataclass(frozen=True)
class PolarForm:
    """A shortcut `A: (k, k')` as `P [I 0] R`; see `polar_form`.

    Attributes:
        rotation: `R: (k', k')`, orthogonal.
        factor: `N: (k, r)` with `P = I - N Nᵀ` and as few columns as that takes; None if `P` has no such structure, as
            an eigenvalue lies above 1, or all of them below.
    """

    rotation: Tensor
    factor: Tensor | None


def polar_form(A: Tensor, tolerance: float) -> PolarForm:
    """Polar decomposition of a shortcut, and what distinguishes its symmetric part from the identity.

    Args:
        A: (k, k') with k ≤ k', float64, finite.
        tolerance: how far from 1 a singular value may lie and count as 1: what rounding did to the shortcut.
    """
    squares, U = torch.linalg.eigh(A @ A.T)  # faster than a singular value decomposition
    values = squares.clamp_min(0).sqrt()
    nearly = U @ (U.T @ A / values[:, None]) if values.min() > _LEAST else None
    rows = None if nearly is None else _orthogonal(nearly)
    if rows is None:
        U, values, Vh = torch.linalg.svd(A, full_matrices=False)
        rows = U @ Vh
    rotation = _completed(rows)
    removed = 1 - values > tolerance
    if removed.all() or (values - 1 > tolerance).any():
        return PolarForm(rotation, None)
    return PolarForm(rotation, U[:, removed] * (1 - values[removed]).sqrt())


def _orthogonal(R: Tensor) -> Tensor | None:
    """The nearest matrix with orthonormal rows, by Newton and Schulz; None where `R` is not near to one."""
    one = torch.eye(len(R), dtype=R.dtype)
    for _ in range(_STEPS):
        error = R @ R.T - one
        norm = error.norm().item()
        if not norm < _NEAR:
            return None
        if norm < _EQUAL * len(R):
            return R
        R = R - error @ R / 2
    return None


def _completed(R: Tensor) -> Tensor:
    """Orthonormal rows, and below them what completes them to a rotation."""
    rows, columns = R.shape
    if rows == columns:
        return R
    Q = torch.linalg.qr(R.T, mode="complete").Q
    return torch.cat([R, Q[:, rows:].T])


def carried_rotation(G: Tensor, R: Tensor) -> Tensor:
    """`G' = Rᵀ (G ⊕ I): (k', k')`, with which `Gᵀ A G' = [Gᵀ P G, 0]`; see `polar_form`."""
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


def trapezoid(M: Tensor) -> Tensor:
    """A factor `(k, r)` turned lower trapezoidal, float64: `M Mᵀ` stays, the diagonal has no negative number."""
    L = torch.linalg.qr(M.T).R.T
    return torch.where(L.diagonal() < 0, -L, L)


def shortcut_from_factor(M: Tensor, width: int) -> Tensor:
    """`[I - M Mᵀ, 0]` as `nn.Linear` stores it, (width, k), float64."""
    wide = M.double()
    dense = torch.zeros(width, len(M), dtype=torch.float64)
    dense[: len(M)] = torch.eye(len(M), dtype=torch.float64) - wide @ wide.T
    return dense
