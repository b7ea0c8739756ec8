"""Matrices of which a part says everything, as rows of words: lower trapezoidal and symmetric ones."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from freebits.codecs.code import Coded, Params
from freebits.types import FLOATS, Kind

WORDS = "words"


class Lower:
    """A lower trapezoidal matrix `(n, m)`: the words on and below its diagonal, row by row."""

    exact = False

    def encode(self, tensors: Sequence[Tensor], makes: Sequence[Kind]) -> Coded:  # noqa: ARG002
        """One matrix; what it has above the diagonal is taken to be zero."""
        [matrix] = tensors
        return Coded({WORDS: lower_words(matrix)})

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[Kind], params: Params) -> list[Tensor]:  # noqa: ARG002
        """The matrix."""
        [kind] = makes
        return [lower_matrix(parts[WORDS], *kind.shape)]

    def parts(self, makes: Sequence[Kind], params: Params) -> dict[str, Kind]:  # noqa: ARG002
        """A row of words as long as the trapezoid is large."""
        [kind] = makes
        rows, columns = kind.shape
        if kind.code not in FLOATS:
            raise ValueError(f"a triangle of {kind}")
        return {WORDS: Kind(kind.code, (n_lower_words(rows, columns),))}


class Symmetric(Lower):
    """The same for a symmetric matrix."""

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[Kind], params: Params) -> list[Tensor]:
        """The matrix."""
        [lower] = super().decode(parts, makes, params)
        return [lower + lower.tril(-1).T]

    def parts(self, makes: Sequence[Kind], params: Params) -> dict[str, Kind]:
        """As of a trapezoid, but only square matrices are symmetric."""
        [kind] = makes
        if len(set(kind.shape)) != 1:
            raise ValueError(f"a symmetric matrix {kind}")
        return super().parts(makes, params)


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
    """The matrix (rows, columns) with zeros above its diagonal, inverse of `lower_words`."""
    short = min(rows, columns)
    row, column = torch.tril_indices(short, short)
    top = words.new_zeros(short, columns)
    top[row, column] = words[: len(row)]
    return torch.cat([top, words[len(row) :].reshape(rows - short, columns)])
