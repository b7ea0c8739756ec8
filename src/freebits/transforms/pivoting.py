"""The canonical form of pairs of matrices: a basis in which one matrix contains the rows of the identity.

For `r` pivot rows of `A: (n, r)`, `A = T A[pivots]`. The pivot rows of `T` are the identity, so that `T` needs `r²`
fewer weights than `A`. If the pivot rows have a large volume (maxvol: Goreinov et al. 2010), all entries of `T` have
an absolute value of at most about 1. Then rounding `T` causes an error of the same order as rounding `A` (strong
rank-revealing factorization: Gu and Eisenstat 1996).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from freebits.models.free_bases import Pair, Span

_MAX_ENTRY = 1.1
"""Largest accepted absolute entry of `T`. Each exchange of a pivot multiplies the volume by more than this value."""
_MAX_EXCHANGES = 4
"""Largest number of exchanges per pivot."""


def act(tensors: Mapping[str, Tensor], pair: Pair, bases: Tensor) -> dict[str, Tensor]:
    """Return the tensors of a pair with another basis in each of its spaces, float64.

    Args:
        tensors: tensors of the pair, any float dtype.
        pair: the pair.
        bases: one invertible matrix per space, `G: (spaces, r, r)`.
    """
    inverses = torch.linalg.inv(bases).mT
    changed: dict[str, Tensor] = {}
    for spans, matrices in ((pair.writes, bases), (pair.reads, inverses)):
        for span in spans:  # continue with the changed tensor, because one tensor may contain both keys and queries
            changed[span.name] = _multiplied(changed.get(span.name, tensors[span.name].double()), span, matrices)
    return changed


def _multiplied(tensor: Tensor, span: Span, matrices: Tensor) -> Tensor:
    """Return a copy of a tensor in which each occurrence of a space is multiplied by the matrix of that space."""
    product = tensor.clone()
    after = product.movedim(span.dim, -1)
    before = tensor.movedim(span.dim, -1)
    for G, starts in zip(matrices, span.starts, strict=True):
        for start in starts:
            after[..., start : start + len(G)] = before[..., start : start + len(G)] @ G
    return product


def pivot_bases(tensors: Mapping[str, Tensor], pair: Pair) -> tuple[Tensor, list[Tensor]] | None:
    """Return the bases in which the first matrix that writes to the spaces contains identities, and the pivot rows.

    Returns:
        `G: (spaces, r, r)`, float64, and for each space its pivot rows, (r,), ascending. None if, in any space, the
        matrix lacks full rank.
    """
    span = pair.writes[0]
    matrix = tensors[span.name].double().movedim(span.dim, -1)
    bases, pivots = [], []
    for [start] in span.starts:
        A = matrix[:, start : start + pair.size]
        rows = pivot_rows(A)
        if rows is None:
            return None
        pivots.append(rows)
        bases.append(torch.linalg.inv(A[rows]))
    return torch.stack(bases), pivots


def pivot_rows(A: Tensor) -> Tensor | None:
    """Return `r` rows of `A: (n, r)` with (nearly) the largest volume, ascending, or None if `A` lacks full rank."""
    n, r = A.shape
    if n < r or not A.isfinite().all():
        return None
    factored, exchanges, _ = torch.linalg.lu_factor_ex(A)
    if factored.diagonal().abs().min() <= torch.finfo(A.dtype).eps * factored.diagonal().abs().max():
        return None
    order = torch.arange(n)
    for index, other in enumerate((exchanges - 1).tolist()):
        order[[index, other]] = order[[other, index]]
    rows = order[:r].to(A.device)
    T = A @ torch.linalg.inv(A[rows])
    for _ in range(_MAX_EXCHANGES * r):
        row, column = divmod(int(T.abs().argmax()), r)
        pivot = T[row, column].item()
        if abs(pivot) <= _MAX_ENTRY:
            break
        change = T[row].clone()
        change[column] -= 1
        T.addr_(T[:, column].clone(), change, alpha=-1 / pivot)
        rows[column] = row
    return rows.sort().values
