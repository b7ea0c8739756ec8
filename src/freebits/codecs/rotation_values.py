"""Convert 16-bit values to rotations and back (Algorithms 1 to 4 of arXiv 2410.01309, the paper).

Encoder and decoder compute in float64. In float32, the eigenvectors of close eigenvalues depend on the number of
threads and on the kernel, so another machine could decode other values.
"""

import torch
from torch import Tensor

_ROWS_AT_ONCE = 8192
"""Number of rows that are converted to float64 at a time."""


def n_values_taken(size: int) -> int:
    """Return the number of values that encode a rotation, (size, size): the upper triangle of a symmetric matrix."""
    return size * (size + 1) // 2


def rotation_from_values(values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Convert values to a rotation (Algorithm 3).

    Args:
        values: (size (size + 1) / 2,), any float dtype, finite, the upper triangle of a symmetric matrix `X`.
        size: the size `k` of the rotation.

    Returns:
        The rotation `Q: (k, k)` and eigenvalues `λ: (k,)` with `X = Q diag(λ) Qᵀ`, in float64.
    """
    row, column = torch.triu_indices(size, size, device=values.device)
    X = torch.zeros(size, size, dtype=torch.float64, device=values.device)
    X[row, column] = values.double()
    X[column, row] = values.double()
    eigenvalues, Q = torch.linalg.eigh(X)
    return Q, eigenvalues


def values_from_rotation(Q: Tensor, eigenvalues: Tensor) -> Tensor:
    """Convert a rotation, (k, k), and eigenvalues, (k,), to values in float64, the inverse of `rotation_from_values`.

    This is Algorithm 4.
    """
    row, column = torch.triu_indices(len(Q), len(Q), device=Q.device)
    X = Q * eigenvalues.double() @ Q.T
    return X[row, column]


def canonical_direction(W: Tensor) -> Tensor:
    """Return the rotation `Q` for which `(W Q)ᵀ (W Q)` is diagonal and ascending (section 3.1, Algorithm 1).

    Args:
        W: (n, k), any float dtype, finite.

    Returns:
        (k, k), float64. If `W` has rank `r < k`, the first `k - r` columns of `W Q` are zero up to rounding errors.
    """
    gram = torch.zeros(W.shape[1], W.shape[1], dtype=torch.float64, device=W.device)
    for rows in W.split(_ROWS_AT_ONCE):
        wide = rows.double()
        gram.addmm_(wide.T, wide)
    return torch.linalg.eigh(gram).eigenvectors


def unsigned_rotation(W: Tensor) -> Tensor:
    """Compute the rotation `Q` for which `W Qᵀ` is in canonical direction (Algorithm 2).

    `W` determines each row of `Q` only up to its sign.

    Args:
        W: (n, k), any float dtype, finite, the rotated matrix.

    Returns:
        (k, k), float64. The sign of each row is chosen so that the sum of the row is not negative.
    """
    rows = canonical_direction(W).T
    return with_signs(rows, rows.sum(1) < 0)


def rotation_signs(unsigned: Tensor, Q: Tensor) -> Tensor:
    """Return a mask, (k,), bool: which rows of `unsigned`, the result of `unsigned_rotation`, are negated in `Q`.

    The paper stores the sign of the sum of each row of `Q`. freebits instead compares each row of `Q` with the row that
    the decoder computes, so that the sign is right even if the sum of the row is nearly zero.
    """
    return (unsigned * Q).sum(1) < 0


def with_signs(rows: Tensor, signs: Tensor) -> Tensor:
    """Return `rows`, (k, k), with those rows negated whose entry in `signs`, (k,), bool, is True."""
    return torch.where(signs[:, None], -rows, rows)
