"""Matrices of which a part says everything, as rows of words: lower trapezoidal and symmetric ones."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from freebits.codecs.code import Coded, Params
from freebits.types import FLOATS, TensorSpec

WORDS = "words"


class Lower:
    """A lower trapezoidal matrix `(n, m)`: the words on and below its diagonal, row by row."""

    exact = False

    def encode(self, tensors: Sequence[Tensor], makes: Sequence[TensorSpec]) -> Coded:  # noqa: ARG002
        """One matrix; what it has above the diagonal is taken to be zero."""
        [matrix] = tensors
        return Coded({WORDS: lower_values(matrix)})

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params) -> list[Tensor]:  # noqa: ARG002
        """The matrix."""
        [spec] = makes
        return [lower_matrix(parts[WORDS], *spec.shape)]

    def parts(self, makes: Sequence[TensorSpec], params: Params) -> dict[str, TensorSpec]:  # noqa: ARG002
        """A row of words as long as the trapezoid is large."""
        [spec] = makes
        rows, columns = spec.shape
        if spec.code not in FLOATS:
            raise ValueError(f"a triangle of {spec}")
        return {WORDS: TensorSpec(spec.code, (n_lower_values(rows, columns),))}


class Symmetric(Lower):
    """The same for a symmetric matrix."""

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params) -> list[Tensor]:
        """The matrix."""
        [lower] = super().decode(parts, makes, params)
        return [lower + lower.tril(-1).T]

    def parts(self, makes: Sequence[TensorSpec], params: Params) -> dict[str, TensorSpec]:
        """As of a trapezoid, but only square matrices are symmetric."""
        [spec] = makes
        if len(set(spec.shape)) != 1:
            raise ValueError(f"a symmetric matrix {spec}")
        return super().parts(makes, params)


def n_lower_values(rows: int, columns: int) -> int:
    """Words of a lower trapezoidal matrix: those on and below the diagonal."""
    short = min(rows, columns)
    return short * (short + 1) // 2 + (rows - short) * columns


def lower_values(matrix: Tensor) -> Tensor:
    """The words on and below the diagonal of a matrix (n, m), row by row."""
    short = min(matrix.shape)
    row, column = torch.tril_indices(short, short)
    return torch.cat([matrix[row, column], matrix[short:].flatten()])


def lower_matrix(words: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix (rows, columns) with zeros above its diagonal, inverse of `lower_values`."""
    short = min(rows, columns)
    row, column = torch.tril_indices(short, short)
    top = words.new_zeros(short, columns)
    top[row, column] = words[: len(row)]
    return torch.cat([top, words[len(row) :].reshape(rows - short, columns)])
