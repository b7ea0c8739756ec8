"""Rotations from words and back (paper, Algorithms 2 to 4). All in float64, on both sides.

In float32 the eigenvectors of close eigenvalues depend on the number of threads and on the kernel, so a
file would decode differently on another machine.
"""

import torch
from torch import Tensor


def n_words_taken(size: int) -> int:
    """Words that make a rotation of `size`: the upper triangle and diagonal of a symmetric matrix."""
    return size * (size + 1) // 2


def rotation_from_words(words: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Decode a rotation from the message (Algorithm 3).

    Args:
        words: (size (size + 1) / 2,), any float dtype, finite.
        size: `k`.

    Returns:
        `Q: (k, k)` and eigenvalues `λ: (k,)` with `X = Q diag(λ) Qᵀ`, both float64.
    """
    row, column = torch.triu_indices(size, size)
    X = torch.zeros(size, size, dtype=torch.float64)
    X[row, column] = words.double()
    X[column, row] = words.double()
    eigenvalues, Q = torch.linalg.eigh(X)
    return Q, eigenvalues


def words_from_rotation(Q: Tensor, eigenvalues: Tensor) -> Tensor:
    """Encode a rotation back into words (Algorithm 4), the inverse of `rotation_from_words`; float64."""
    row, column = torch.triu_indices(len(Q), len(Q))
    X = Q * eigenvalues.double() @ Q.T
    return X[row, column]


def rotation_signs(W: Tensor, Q: Tensor) -> Tensor:
    """What `recovered_rotation` cannot see: the sign of each row of `Q`, (k,), bool.

    The paper stores the sign of each row's sum. It is compared here with the sum that the decoder will see,
    so a row whose sum is nearly zero costs nothing either.
    """
    recovered = recovered_rotation(W, torch.zeros(len(Q), dtype=torch.bool))
    return (recovered * Q).sum(1) < 0


def recovered_rotation(W: Tensor, signs: Tensor) -> Tensor:
    """The rotation `Q` that took a matrix from its canonical direction to `W` (Algorithm 2).

    Args:
        W: (n, k), float64, the rotated matrix.
        signs: (k,), bool, which rows of `Q` have a negative sum.

    Returns:
        `Q: (k, k)`, float64.
    """
    rows = torch.linalg.eigh(W.T @ W).eigenvectors.T
    negative = rows.sum(1) < 0
    return torch.where((negative ^ signs)[:, None], -rows, rows)
