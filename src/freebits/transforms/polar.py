"""The canonical form of shortcuts: rotations after which shortcuts need few weights. The rotations are not stored.

A shortcut `A: (k, k')` is the matrix on the skip connection from site `s - 1` to site `s` of the residual stream; it
maps a row vector `x` to `x A`. Rotations `G₋` and `G` of these sites change `A` to `G₋ᵀ A G`. Slicing gives
`A = Q₋ᵀ Q`, where `Q₋` and `Q` have the axes of the two sites as columns. At most `D - k'` singular values of `A` are
not 1. Let `A = P [I 0] R` be the polar decomposition of `A`. With `G = Rᵀ (G₋ ⊕ I)`, where `⊕` builds a block diagonal
matrix, the shortcut becomes `[G₋ᵀ P G₋, 0]`. The matrix `G₋ᵀ P G₋` is symmetric, and all but a few of its eigenvalues
are 1. Therefore it equals `I - M Mᵀ` with few columns in `M`. A rotation of these columns leaves `M Mᵀ` unchanged and
makes `M` lower trapezoidal. The rotation of site 0 remains free.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_MIN_SINGULAR_VALUE = 1e-6
"""Smallest singular value of `A` that can be computed accurately from the eigenvalues of `A Aᵀ`."""
_MIN_RELATIVE_EIGENVALUE = 1e-20
"""Eigenvalues of a Gram matrix below this fraction of the largest eigenvalue count as zero."""
_NEWTON_STEPS, _MAX_INITIAL_ERROR, _MAX_FINAL_ERROR = 5, 0.5, 1e-15
_SUBSPACE_MIN_SIZE, _OVERSAMPLING, _SUBSPACE_ITERATIONS, _POWER_ITERATIONS = 256, 8, 3, 30
"""Settings of subspace iteration, in this order: the smallest `k` for which it is used; the number of extra columns;
the number of iterations; the number of power iterations that check the result."""


@dataclass(frozen=True)
class PolarForm:
    """The polar decomposition `A = P [I 0] R` of a shortcut `A: (k, k')`; see `polar_form`.

    Attributes:
        rotation: `R: (k', k')`, orthogonal.
        factor: `N: (k, r)` with `P = I - N Nᵀ` and the smallest `r`; None if an eigenvalue of `P` is above 1 or if all
            eigenvalues are below 1.
    """

    rotation: Tensor
    factor: Tensor | None


def polar_form(A: Tensor, tolerance: float, defect: int | None = None) -> PolarForm:
    """Return the polar decomposition of a shortcut, with `P` written as the identity minus a low-rank matrix.

    Args:
        A: (k, k') with k ≤ k', float64, finite.
        tolerance: largest distance from 1 at which a singular value counts as 1, because `A` has rounding errors.
        defect: expected number of singular values that are not 1; None if unknown.
    """
    if defect is not None and len(A) >= _SUBSPACE_MIN_SIZE and 0 < defect <= len(A) // 2:
        form = _nearly_orthogonal_form(A, tolerance, defect)
        if form is not None:
            return form
    squares, U = torch.linalg.eigh(A @ A.T)  # faster than an SVD
    values = squares.clamp_min(0).sqrt()
    approximate = U @ (U.T @ A / values[:, None]) if values.min() > _MIN_SINGULAR_VALUE else None
    rows = None if approximate is None else _orthogonal(approximate)
    if rows is None:
        U, values, Vh = torch.linalg.svd(A, full_matrices=False)
        rows = U @ Vh
    rotation = _completed(rows)
    removed = 1 - values > tolerance
    if removed.all() or (values - 1 > tolerance).any():
        return PolarForm(rotation, None)
    return PolarForm(rotation, U[:, removed] * (1 - values[removed]).sqrt())


def _nearly_orthogonal_form(A: Tensor, tolerance: float, defect: int) -> PolarForm | None:
    """Return the polar form of a matrix with few singular values other than 1, or None if the fast method fails.

    Randomized subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4) finds the range of `I - A Aᵀ`.
    The singular values in this range are set to 1. The rows of the result are nearly orthonormal and are then made
    orthonormal.
    """
    generator = torch.Generator().manual_seed(0)
    Q = torch.randn(len(A), defect + _OVERSAMPLING, generator=generator, dtype=torch.float64).to(A.device)
    for _ in range(_SUBSPACE_ITERATIONS):
        Q = _orthonormal_basis(_orthonormal_basis(Q - A @ (A.T @ Q)))
    projected = Q.T @ A
    squares, W = torch.linalg.eigh(projected @ projected.T)
    values = squares.clamp_min(0).sqrt()
    if values[0] <= _MIN_SINGULAR_VALUE or (values - 1 > tolerance).any():
        return None
    U = Q @ W
    approximate = A + (U * (1 - values)) @ (W.T @ projected / values[:, None])
    error = approximate @ approximate.T - torch.eye(len(A), dtype=torch.float64, device=A.device)
    if torch.linalg.vector_norm(_power_iteration(error, generator)) > 2 * tolerance * (1 + tolerance):
        return None  # other singular values differ from 1, too
    rows = _orthogonal(approximate - error @ approximate / 2)
    if rows is None:
        return None
    removed = 1 - values > tolerance
    return PolarForm(_completed(rows), U[:, removed] * (1 - values[removed]).sqrt())


def _orthonormal_basis(Y: Tensor) -> Tensor:
    """Return orthonormal columns that span the columns of `Y` numerically, from its Gram matrix."""
    squares, W = torch.linalg.eigh(Y.T @ Y)
    nonzero = squares > _MIN_RELATIVE_EIGENVALUE * squares[-1]
    return Y @ (W[:, nonzero] / squares[nonzero].sqrt())


def _power_iteration(symmetric: Tensor, generator: torch.Generator) -> Tensor:
    """Return a vector whose norm estimates the largest absolute eigenvalue of a symmetric matrix."""
    x = torch.randn(len(symmetric), generator=generator, dtype=torch.float64).to(symmetric.device)
    for _ in range(_POWER_ITERATIONS):
        x = symmetric @ (x / torch.linalg.vector_norm(x).clamp_min(torch.finfo(torch.float64).tiny))
    return x


def _orthogonal(R: Tensor) -> Tensor | None:
    """Return the nearest matrix with orthonormal rows (Newton-Schulz iteration), or None if `R` is too far from one."""
    identity = torch.eye(len(R), dtype=R.dtype, device=R.device)
    for _ in range(_NEWTON_STEPS):
        error = R @ R.T - identity
        norm = error.norm().item()
        if not norm < _MAX_INITIAL_ERROR:
            return None
        if norm < _MAX_FINAL_ERROR * len(R):
            return R
        R = R - error @ R / 2
    return None


def _completed(R: Tensor) -> Tensor:
    """Return an orthogonal matrix that begins with the given orthonormal rows."""
    rows, columns = R.shape
    if rows == columns:
        return R
    Q = torch.linalg.qr(R.T, mode="complete").Q
    return torch.cat([R, Q[:, rows:].T])


def carried_rotation(G: Tensor, R: Tensor) -> Tensor:
    """Return `G' = Rᵀ (G ⊕ I): (k', k')`, for which `Gᵀ A G' = [Gᵀ P G, 0]`; see `polar_form`."""
    return torch.cat([R[: len(G)].T @ G, R[len(G) :].T], dim=1)


def triangular_rotation(W: Tensor) -> Tensor:
    """Return the rotation `G: (k, k)` that makes `W G` lower trapezoidal with a non-negative diagonal.

    Args:
        W: (n, k), float64, finite.
    """
    Q, R = torch.linalg.qr(W[: W.shape[1]].T, mode="complete")
    negative = torch.zeros(len(Q), dtype=torch.bool, device=Q.device)
    negative[: R.shape[1]] = R.diagonal() < 0
    return torch.where(negative, -Q, Q)


def trapezoid(M: Tensor) -> Tensor:
    """Return the lower trapezoidal `L: (k, r)` with `L Lᵀ = M Mᵀ` and a non-negative diagonal, float64."""
    L = torch.linalg.qr(M.T).R.T
    return torch.where(L.diagonal() < 0, -L, L)


def shortcut_from_factor(M: Tensor, width: int) -> Tensor:
    """Return `[I - M Mᵀ, 0]` as `nn.Linear` stores it, (width, k), float64."""
    wide = M.double()
    dense = torch.zeros(width, len(M), dtype=torch.float64)
    dense[: len(M)] = torch.eye(len(M), dtype=torch.float64) - wide @ wide.T
    return dense
