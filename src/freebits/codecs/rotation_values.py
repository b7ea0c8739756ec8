"""Rotations from 16-bit values and back (paper, Algorithms 2 to 4). Encoder and decoder compute in float64.

In float32 the eigenvectors of close eigenvalues depend on the number of threads and on the kernel, so
another machine would decode a file differently.
"""

import torch
from torch import Tensor

_ROWS_AT_ONCE = 8192
"""Rows that are converted to float64 at a time."""


def n_values_taken(size: int) -> int:
    """Return the number of values that encode a rotation: a symmetric matrix's upper triangle with the diagonal."""
    return size * (size + 1) // 2


def rotation_from_values(values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Decode a rotation from the message (Algorithm 3).

    Args:
        values: (size (size + 1) / 2,), any float dtype, finite.
        size: `k`.

    Returns:
        `Q: (k, k)` and eigenvalues `λ: (k,)` with `X = Q diag(λ) Qᵀ`, both float64.
    """
    row, column = torch.triu_indices(size, size, device=values.device)
    X = torch.zeros(size, size, dtype=torch.float64, device=values.device)
    X[row, column] = values.double()
    X[column, row] = values.double()
    eigenvalues, Q = torch.linalg.eigh(X)
    return Q, eigenvalues


def values_from_rotation(Q: Tensor, eigenvalues: Tensor) -> Tensor:
    """Encode a rotation back into values (Algorithm 4), the inverse of `rotation_from_values`; float64."""
    row, column = torch.triu_indices(len(Q), len(Q), device=Q.device)
    X = Q * eigenvalues.double() @ Q.T
    return X[row, column]


def canonical_direction(W: Tensor) -> Tensor:
    """Return the rotation `Q` that makes `(W Q)ᵀ (W Q)` diagonal, ascending (paper, section 3.1 and Algorithm 1).

    Args:
        W: (n, k), any float dtype, finite.

    Returns:
        (k, k), float64. Where `W` has rank `r < k`, the first `k - r` columns of `W Q` are zero.
    """
    gram = torch.zeros(W.shape[1], W.shape[1], dtype=torch.float64, device=W.device)
    for rows in W.split(_ROWS_AT_ONCE):
        wide = rows.double()
        gram.addmm_(wide.T, wide)
    return torch.linalg.eigh(gram).eigenvectors


def unsigned_rotation(W: Tensor) -> Tensor:
    """Return the rotation `Q` that took a matrix from its canonical direction to `W` (Algorithm 2), up to signs.

    Args:
        W: (n, k), any float dtype, the rotated matrix.

    Returns:
        `Q: (k, k)`, float64, with the sign of each row chosen so that its sum is not negative.
    """
    rows = canonical_direction(W).T
    return with_signs(rows, rows.sum(1) < 0)


def rotation_signs(unsigned: Tensor, Q: Tensor) -> Tensor:
    """Return which rows of `unsigned_rotation` must be negated to get `Q`, (k,), bool.

    The paper stores the sign of each row's sum. This code compares each row with the row that the decoder computes,
    so that a row whose sum is nearly zero needs no correction either.
    """
    return (unsigned * Q).sum(1) < 0


def with_signs(rows: Tensor, signs: Tensor) -> Tensor:
    """Return the rows, negated where the sign is set."""
    return torch.where(signs[:, None], -rows, rows)
