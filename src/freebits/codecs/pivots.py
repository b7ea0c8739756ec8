"""A matrix in spaces of which each has the identity among its columns: the other columns, and which those are."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from freebits.codecs.code import Coded, Declined, Params
from freebits.types import FLOATS, TensorSpec

WORDS, PIVOTS = "words", "pivots"


class Pivots:
    """A matrix `(n, m)`, or with `dim` 1 its transpose `(m, n)`.

    Each of `spaces` is so many rows from one on, and has as many pivots, one for each row and ascending: columns
    that are the identity's. Stored are the pivots, space after space; then the words of each space without them, row by
    row; then the rows of no space.
    """

    exact = False

    def __init__(self, spaces: Sequence[tuple[int, int]] = (), dim: int = 0) -> None:
        self.params: Params = {"spaces": [list(space) for space in spaces], "dim": dim}

    def encode(self, tensors: Sequence[Tensor], makes: Sequence[TensorSpec]) -> Coded:  # noqa: ARG002
        """One matrix.

        Raises:
            Declined: a space lacks a column of the identity.
        """
        [tensor] = tensors
        matrix = tensor.movedim(self.params["dim"], 0)
        pivots, words = [], []
        for start, size in self.params["spaces"]:
            space = matrix[start : start + size]
            found = identity_columns(space)
            if found is None:
                raise Declined("its spaces lack columns of the identity")
            others = torch.ones(matrix.shape[1], dtype=torch.bool)
            others[found] = False
            pivots.append(found)
            words.append(space[:, others].flatten())
        words.append(matrix[_others(len(matrix), self.params)].flatten())
        return Coded({PIVOTS: torch.cat(pivots).int(), WORDS: torch.cat(words)}, dict(self.params))

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params) -> list[Tensor]:
        """The matrix."""
        [spec] = makes
        dim, words = params["dim"], parts[WORDS]
        n, m = spec.shape[dim], spec.shape[1 - dim]
        matrix = torch.empty(n, m, dtype=words.dtype)
        sizes = [size for _, size in params["spaces"]]
        pivots = parts[PIVOTS].long().split(sizes)
        at = 0
        for (start, size), columns in zip(params["spaces"], pivots, strict=True):
            if columns[0] < 0 or columns[-1] >= m or (columns.diff() <= 0).any():
                raise ValueError("pivots that are no columns in ascending order")
            others = torch.ones(m, dtype=torch.bool)
            others[columns] = False
            space = matrix[start : start + size]
            space[:, columns] = torch.eye(size, dtype=words.dtype)
            space[:, others] = words[at : at + size * (m - size)].reshape(size, -1)
            at += size * (m - size)
        matrix[_others(n, params)] = words[at:].reshape(-1, m)
        return [matrix.movedim(0, dim).contiguous()]

    def parts(self, makes: Sequence[TensorSpec], params: Params) -> dict[str, TensorSpec]:
        """So many pivots, and the words that are left."""
        [spec] = makes
        spaces, dim = params["spaces"], params["dim"]
        if spec.code not in FLOATS or len(spec.shape) != 2 or type(dim) is not int or dim not in (0, 1):
            raise ValueError(f"spaces along {dim!r} of {spec}")
        n, m = spec.shape[dim], spec.shape[1 - dim]
        end = count = squares = 0
        for start, size in spaces:
            if type(start) is not int or type(size) is not int or not 0 < size <= m or start < end:
                raise ValueError(f"a space of {size!r} rows from {start!r} on after {end}, in {m} columns")
            end, count, squares = start + size, count + size, squares + size**2
        if end > n or not count:
            raise ValueError(f"{count} pivots, up to row {end}, in {n} rows")
        return {PIVOTS: TensorSpec("I32", (count,)), WORDS: TensorSpec(spec.code, (n * m - squares,))}


def identity_columns(space: Tensor) -> Tensor | None:
    """The columns of `(r, m)` that are the identity's, (r,), ascending; None where they are not all there in order."""
    single = ((space != 0).sum(0) == 1).nonzero().flatten()
    ones = single[(space[:, single].sum(0) == 1).nonzero().flatten()]
    row = space[:, ones].argmax(0)
    first = [ones[row == number][:1] for number in range(len(space))]
    columns = torch.cat(first)
    return None if len(columns) < len(space) or (columns.diff() <= 0).any() else columns


def _others(n: int, params: Params) -> Tensor:
    """The rows that are in no space, as a mask."""
    others = torch.ones(n, dtype=torch.bool)
    for start, size in params["spaces"]:
        others[start : start + size] = False
    return others
