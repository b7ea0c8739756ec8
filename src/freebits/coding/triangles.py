"""Matrices of which a part says everything, as rows of words: lower trapezoidal and symmetric ones."""

import torch
from torch import Tensor


def n_lower_words(rows: int, columns: int) -> int:
    """Words of a lower trapezoidal matrix: those on and below the diagonal."""
    short = min(rows, columns)
    return short * (short + 1) // 2 + (rows - short) * columns


def lower_words(matrix: Tensor) -> Tensor:
    """The words on and below the diagonal of a matrix (n, m), row by row."""
    short = min(matrix.shape)
    row, column = torch.tril_indices(short, short)
    return torch.cat([matrix[row, column], matrix[short:].flatten()])


def lower_matrix(words: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix (rows, columns) with zeros above its diagonal, inverse of `lower_words`.

    Raises:
        ValueError: there are more or fewer words than that.
    """
    if len(words) != n_lower_words(rows, columns):
        raise ValueError(f"{len(words)} words for a trapezoid of {rows} x {columns}")
    short = min(rows, columns)
    row, column = torch.tril_indices(short, short)
    top = words.new_zeros(short, columns)
    top[row, column] = words[: len(row)]
    return torch.cat([top, words[len(row) :].reshape(rows - short, columns)])


def symmetric_matrix(words: Tensor, size: int) -> Tensor:
    """The symmetric matrix (size, size) that has these words on and below its diagonal.

    Raises:
        ValueError: there are more or fewer words than that.
    """
    lower = lower_matrix(words, size, size)
    return lower + lower.tril(-1).T
