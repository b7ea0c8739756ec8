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
_LOST = 1e-20
_STEPS, _NEAR, _EQUAL = 5, 0.5, 1e-15
_WORTH, _MORE, _ITERATIONS, _POWERS = 256, 8, 3, 30
"""From which size on few singular values are looked for; how many more than expected; in how many iterations; and in
how many the largest eigenvalue of what is left."""


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


def polar_form(A: Tensor, tolerance: float, defect: int | None = None) -> PolarForm:
    """Polar decomposition of a shortcut, and what distinguishes its symmetric part from the identity.

    Args:
        A: (k, k') with k ≤ k', float64, finite.
        tolerance: how far from 1 a singular value may lie and count as 1: what rounding did to the shortcut.
        defect: how many singular values are not expected to be 1; None for no expectation.
    """
    if defect is not None and len(A) >= _WORTH and 0 < defect <= len(A) // 2:
        form = _nearly_orthogonal_form(A, tolerance, defect)
        if form is not None:
            return form
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


def _nearly_orthogonal_form(A: Tensor, tolerance: float, defect: int) -> PolarForm | None:
    """The same of a matrix all of whose singular values but few are 1, by the few; None where it is none.

    The range of `I - A Aᵀ` is found by randomised subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4).
    In it the singular values are found and set to 1, and what is then nearly orthogonal becomes it.
    """
    generator = torch.Generator().manual_seed(0)
    Q = torch.randn(len(A), defect + _MORE, generator=generator, dtype=torch.float64).to(A.device)
    for _ in range(_ITERATIONS):
        Q = _basis(_basis(Q - A @ (A.T @ Q)))
    inside = Q.T @ A
    squares, W = torch.linalg.eigh(inside @ inside.T)
    values = squares.clamp_min(0).sqrt()
    if values[0] <= _LEAST or (values - 1 > tolerance).any():
        return None
    U = Q @ W
    near = A + (U * (1 - values)) @ (W.T @ inside / values[:, None])
    error = near @ near.T - torch.eye(len(A), dtype=torch.float64, device=A.device)
    if torch.linalg.vector_norm(_power(error, generator)) > 2 * tolerance * (1 + tolerance):
        return None  # there are more that are not 1
    rows = _orthogonal(near - error @ near / 2)
    if rows is None:
        return None
    removed = 1 - values > tolerance
    return PolarForm(_completed(rows), U[:, removed] * (1 - values[removed]).sqrt())


def _basis(Y: Tensor) -> Tensor:
    """Orthonormal columns that span those of `Y` but for what is lost in it, by its Gram matrix: products alone."""
    squares, W = torch.linalg.eigh(Y.T @ Y)
    kept = squares > _LOST * squares[-1]
    return Y @ (W[:, kept] / squares[kept].sqrt())


def _power(symmetric: Tensor, generator: torch.Generator) -> Tensor:
    """A symmetric matrix times a vector of length 1 in which its largest eigenvalue has come to the fore."""
    x = torch.randn(len(symmetric), generator=generator, dtype=torch.float64).to(symmetric.device)
    for _ in range(_POWERS):
        x = symmetric @ (x / torch.linalg.vector_norm(x).clamp_min(torch.finfo(torch.float64).tiny))
    return x


def _orthogonal(R: Tensor) -> Tensor | None:
    """The nearest matrix with orthonormal rows, by Newton and Schulz; None where `R` is not near to one."""
    one = torch.eye(len(R), dtype=R.dtype, device=R.device)
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
    negative = torch.zeros(len(Q), dtype=torch.bool, device=Q.device)
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
