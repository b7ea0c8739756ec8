"""Rotations from words and back (paper, Algorithms 2 to 4). All in float64, on both sides.

In float32 the eigenvectors of close eigenvalues depend on the number of threads and on the kernel, so a
file would decode differently on another machine.
"""

import torch
from torch import Tensor

_ROWS = 8192
"""So many are widened to float64 at a time."""


def n_values_taken(size: int) -> int:
    """Words that make a rotation of `size`: the upper triangle and diagonal of a symmetric matrix."""
    return size * (size + 1) // 2


def rotation_from_values(words: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Decode a rotation from the message (Algorithm 3).

    Args:
        words: (size (size + 1) / 2,), any float dtype, finite.
        size: `k`.

    Returns:
        `Q: (k, k)` and eigenvalues `λ: (k,)` with `X = Q diag(λ) Qᵀ`, both float64.
    """
    row, column = torch.triu_indices(size, size, device=words.device)
    X = torch.zeros(size, size, dtype=torch.float64, device=words.device)
    X[row, column] = words.double()
    X[column, row] = words.double()
    eigenvalues, Q = torch.linalg.eigh(X)
    return Q, eigenvalues


def values_from_rotation(Q: Tensor, eigenvalues: Tensor) -> Tensor:
    """Encode a rotation back into words (Algorithm 4), the inverse of `rotation_from_values`; float64."""
    row, column = torch.triu_indices(len(Q), len(Q), device=Q.device)
    X = Q * eigenvalues.double() @ Q.T
    return X[row, column]


def canonical_direction(W: Tensor) -> Tensor:
    """The rotation `Q` for which `(W Q)ᵀ (W Q)` is diagonal, ascending (paper, section 3.1 and Algorithm 1).

    Args:
        W: (n, k), any float dtype, finite.

    Returns:
        (k, k), float64. Where `W` has rank `r < k`, the first `k - r` columns of `W Q` are zero.
    """
    gram = torch.zeros(W.shape[1], W.shape[1], dtype=torch.float64, device=W.device)
    for rows in W.split(_ROWS):
        wide = rows.double()
        gram.addmm_(wide.T, wide)
    return torch.linalg.eigh(gram).eigenvectors


def unsigned_rotation(W: Tensor) -> Tensor:
    """The rotation `Q` that took a matrix from its canonical direction to `W` (Algorithm 2), each row with a sum >= 0.

    Args:
        W: (n, k), any float dtype, the rotated matrix.

    Returns:
        `Q: (k, k)` but for the signs of its rows, float64.
    """
    rows = canonical_direction(W).T
    return with_signs(rows, rows.sum(1) < 0)


def rotation_signs(unsigned: Tensor, Q: Tensor) -> Tensor:
    """What `unsigned_rotation` cannot see: which rows of `Q` are the other way round, (k,), bool.

    The paper stores the sign of each row's sum. Rows are compared here with those that the decoder will see, so a row
    whose sum is nearly zero costs nothing either.
    """
    return (unsigned * Q).sum(1) < 0


def with_signs(rows: Tensor, signs: Tensor) -> Tensor:
    """Rows, those turned round whose sign is set."""
    return torch.where(signs[:, None], -rows, rows)
