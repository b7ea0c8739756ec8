"""The canonical form of pairs: a basis in which one of the two matrices has the rows of the identity.

Of `A: (n, r)` choose `r` pivot rows and make them the identity: `A = T A[pivots]`, and `T` has `r²` numbers less to
store. Rows of large volume (maxvol: Goreinov et al. 2010) keep every number of `T` near to or below 1, so that rounding
it costs no more than rounding `A` (strong rank-revealing factorisation: Gu and Eisenstat 1996).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from freebits.models.pairs import Pair, Span

_MOST = 1.1
"""So large may a number of `T` be; each exchange of a pivot multiplies their volume by more than that."""
_EXCHANGES = 4
"""At most so many for each pivot."""


def act(tensors: Mapping[str, Tensor], pair: Pair, bases: Tensor) -> dict[str, Tensor]:
    """A pair's tensors with another basis in each of its spaces, float64.

    Args:
        tensors: those of the pair, any float dtype.
        pair: where they have its spaces.
        bases: `G: (spaces, r, r)`, invertible; for orthogonal ones what writes and what reads is treated alike.
    """
    inverses = torch.linalg.inv(bases).mT
    acted: dict[str, Tensor] = {}
    for spans, by in ((pair.writes, bases), (pair.reads, inverses)):
        for span in spans:  # keys and queries, of one space, may be in one tensor
            acted[span.name] = _contracted(acted.get(span.name, tensors[span.name].double()), span, by)
    return acted


def _contracted(tensor: Tensor, span: Span, by: Tensor) -> Tensor:
    """Each of a tensor's places multiplied by the matrix of its space."""
    contracted = tensor.clone()
    along = contracted.movedim(span.dim, -1)
    before = tensor.movedim(span.dim, -1)
    for G, starts in zip(by, span.starts, strict=True):
        for start in starts:
            along[..., start : start + len(G)] = before[..., start : start + len(G)] @ G
    return contracted


def pivot_bases(tensors: Mapping[str, Tensor], pair: Pair) -> tuple[Tensor, list[Tensor]] | None:
    """The bases in which the first matrix that writes has the identity among its rows, and which rows these are.

    Returns:
        `G: (spaces, r, r)`, float64, and for each space its pivots, (r,), ascending; None where a matrix is singular.
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
    """`r` rows of `A: (n, r)` whose volume is (nearly) the largest, ascending; None where it has not full rank."""
    n, r = A.shape
    if n < r or not A.isfinite().all():
        return None
    factored, exchanges, _ = torch.linalg.lu_factor_ex(A)
    if factored.diagonal().abs().min() <= torch.finfo(A.dtype).eps * factored.diagonal().abs().max():
        return None
    order = torch.arange(n)
    for at, other in enumerate((exchanges - 1).tolist()):
        order[[at, other]] = order[[other, at]]
    rows = order[:r].to(A.device)
    T = A @ torch.linalg.inv(A[rows])
    for _ in range(_EXCHANGES * r):
        row, column = divmod(int(T.abs().argmax()), r)
        pivot = T[row, column].item()
        if abs(pivot) <= _MOST:
            break
        change = T[row].clone()
        change[column] -= 1
        T.addr_(T[:, column].clone(), change, alpha=-1 / pivot)
        rows[column] = row
    return rows.sort().values
