"""Lower trapezoidal and symmetric matrices, stored as the values on and below the diagonal."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from freebits.codecs.base import Check, Coded, Params
from freebits.types import FLOATS, TensorSpec

WORDS = "words"


class Lower:
    """A lower trapezoidal matrix `(n, m)`, stored as the values on and below its diagonal, row by row."""

    exact = False
    check = Check.DIGEST
    param_names: frozenset[str] = frozenset()

    def encode(self, tensors: Sequence[Tensor], makes: Sequence[TensorSpec]) -> Coded:  # noqa: ARG002
        """Encode one matrix. Ignore the values above its diagonal."""
        [matrix] = tensors
        return Coded({WORDS: lower_values(matrix)})

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params) -> list[Tensor]:  # noqa: ARG002
        """Return the matrix."""
        [spec] = makes
        return [lower_matrix(parts[WORDS], *spec.shape)]

    def parts(self, makes: Sequence[TensorSpec], params: Params) -> dict[str, TensorSpec]:  # noqa: ARG002
        """Return the spec of the values on and below the diagonal."""
        [spec] = makes
        rows, columns = spec.shape
        if spec.dtype_name not in FLOATS:
            raise ValueError(f"the `lower` code makes matrices of floats, not {spec}")
        return {WORDS: TensorSpec(spec.dtype_name, (n_lower_values(rows, columns),))}


class Symmetric(Lower):
    """A symmetric matrix, stored as its lower triangle."""

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params) -> list[Tensor]:
        """Return the matrix."""
        [lower] = super().decode(parts, makes, params)
        return [lower + lower.tril(-1).T]

    def parts(self, makes: Sequence[TensorSpec], params: Params) -> dict[str, TensorSpec]:
        """Return the spec of the lower triangle of a square matrix."""
        [spec] = makes
        if len(set(spec.shape)) != 1:
            raise ValueError(f"the `symmetric` code makes square matrices, not {spec}")
        return super().parts(makes, params)


def n_lower_values(rows: int, columns: int) -> int:
    """Return the number of values on and below the diagonal of a matrix (rows, columns)."""
    short = min(rows, columns)
    return short * (short + 1) // 2 + (rows - short) * columns


def lower_values(matrix: Tensor) -> Tensor:
    """Return the values on and below the diagonal of a matrix (n, m), row by row, (n_lower_values(n, m),)."""
    short = min(matrix.shape)
    row, column = torch.tril_indices(short, short)
    return torch.cat([matrix[row, column], matrix[short:].flatten()])


def lower_matrix(values: Tensor, rows: int, columns: int) -> Tensor:
    """Return the matrix (rows, columns) with zeros above its diagonal; the inverse of `lower_values`."""
    short = min(rows, columns)
    row, column = torch.tril_indices(short, short)
    top = values.new_zeros(short, columns)
    top[row, column] = values[: len(row)]
    return torch.cat([top, values[len(row) :].reshape(rows - short, columns)])
