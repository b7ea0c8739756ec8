"""A matrix in which some ranges of rows contain all columns of an identity matrix. These columns are not stored."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from freebits.codecs.base import Check, Coded, Declined, Params
from freebits.types import FLOATS, TensorSpec

WORDS, PIVOTS = "words", "pivots"


class Pivots:
    """A matrix `(n, m)`, or its transpose `(m, n)` if `dim` is 1.

    Each *space*, `[start, size]`, is a range of `size` rows that begins at row `start`. The `size` columns of a space
    that form the identity are its *pivots*. Part `pivots` has the column indices of the pivots, space by space. Part
    `words` has the other columns of each space, row by row, and then the rows outside all spaces.

    Args:
        spaces: the spaces that `encode` uses, in ascending order.
        dim: 0 for a matrix `(n, m)`, 1 for a transpose `(m, n)`.
    """

    exact = False
    check = Check.DIGEST
    param_names = frozenset({"spaces", "dim"})

    def __init__(self, spaces: Sequence[tuple[int, int]] = (), dim: int = 0) -> None:
        self.params: Params = {"spaces": [list(space) for space in spaces], "dim": dim}

    def encode(self, tensors: Sequence[Tensor], makes: Sequence[TensorSpec]) -> Coded:  # noqa: ARG002
        """Encode one matrix.

        Raises:
            Declined: a space lacks a column of the identity, or the columns are not in order.
        """
        [tensor] = tensors
        matrix = tensor.movedim(self.params["dim"], 0)
        pivots, values = [], []
        for start, size in self.params["spaces"]:
            space = matrix[start : start + size]
            columns = identity_columns(space)
            if columns is None:
                raise Declined("a space lacks columns of the identity")
            other_columns = torch.ones(matrix.shape[1], dtype=torch.bool)
            other_columns[columns] = False
            pivots.append(columns)
            values.append(space[:, other_columns].flatten())
        values.append(matrix[_rows_outside(len(matrix), self.params)].flatten())
        return Coded({PIVOTS: torch.cat(pivots).int(), WORDS: torch.cat(values)}, dict(self.params))

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params) -> list[Tensor]:
        """Return the matrix."""
        [spec] = makes
        dim, values = params["dim"], parts[WORDS]
        n, m = spec.shape[dim], spec.shape[1 - dim]
        matrix = torch.empty(n, m, dtype=values.dtype)
        sizes = [size for _, size in params["spaces"]]
        pivots = parts[PIVOTS].long().split(sizes)
        offset = 0
        for (start, size), columns in zip(params["spaces"], pivots, strict=True):
            if columns[0] < 0 or columns[-1] >= m or (columns.diff() <= 0).any():
                raise ValueError("the pivots are not column numbers in ascending order")
            other_columns = torch.ones(m, dtype=torch.bool)
            other_columns[columns] = False
            space, end = matrix[start : start + size], offset + size * (m - size)
            space[:, columns] = torch.eye(size, dtype=values.dtype)
            space[:, other_columns] = values[offset:end].reshape(size, -1)
            offset = end
        matrix[_rows_outside(n, params)] = values[offset:].reshape(-1, m)
        return [matrix.movedim(0, dim).contiguous()]

    def parts(self, makes: Sequence[TensorSpec], params: Params) -> dict[str, TensorSpec]:
        """Return the specs of the pivots and of the other values."""
        [spec] = makes
        spaces, dim = params["spaces"], params["dim"]
        if spec.dtype_name not in FLOATS or len(spec.shape) != 2 or type(dim) is not int or dim not in (0, 1):
            raise ValueError(f"the `pivots` code makes matrices of floats with dim 0 or 1, not {spec} with dim {dim!r}")
        n, m = spec.shape[dim], spec.shape[1 - dim]
        end = n_pivots = n_omitted = 0
        for start, size in spaces:
            if type(start) is not int or type(size) is not int or not 0 < size <= m or start < end:
                raise ValueError(
                    f"a space has {size!r} rows from row {start!r}: it needs 1 to {m} rows, from row {end} or later"
                )
            end, n_pivots, n_omitted = start + size, n_pivots + size, n_omitted + size**2
        if end > n or not n_pivots:
            raise ValueError(
                f"the spaces have {n_pivots} pivots and end at row {end}: they must have at least one pivot, and end "
                f"at row {n} or earlier"
            )
        return {PIVOTS: TensorSpec("I32", (n_pivots,)), WORDS: TensorSpec(spec.dtype_name, (n * m - n_omitted,))}


def identity_columns(space: Tensor) -> Tensor | None:
    """Return the numbers, (r,), ascending, of the columns of a space, (r, m), that form the identity.

    Return None if a column of the identity is missing, or if the columns are not in order.
    """
    single = ((space != 0).sum(0) == 1).nonzero().flatten()
    ones = single[(space[:, single].sum(0) == 1).nonzero().flatten()]
    row = space[:, ones].argmax(0)
    columns = torch.cat([ones[row == index][:1] for index in range(len(space))])
    return None if len(columns) < len(space) or (columns.diff() <= 0).any() else columns


def _rows_outside(n: int, params: Params) -> Tensor:
    """Return a mask, (n,), of the rows outside all spaces."""
    outside = torch.ones(n, dtype=torch.bool)
    for start, size in params["spaces"]:
        outside[start : start + size] = False
    return outside
