"""Round a matrix column by column, and let the columns to come make up for each error.

The loss is `tr((W - Ŵ) H (W - Ŵ)ᵀ)` for the Gram matrix `H` of the matrix's inputs. GPTQ, LDLQ and Babai's nearest
plane are three names of this algorithm; whatever it rounds to, the loss comes to `Σ_i |w_i - q_i|² / U_ii²`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_BLOCK = 128
Round = Callable[[Tensor, int], Tensor]
"""What some columns, (n, width), starting with a given one, are rounded to."""


def whitener(gram: Tensor, damping: float) -> Tensor:
    """`U`, upper triangular with `H⁻¹ = Uᵀ U`, (m, m), float64.

    Args:
        gram: (m, m), positive semi-definite.
        damping: part of its mean diagonal that is added to it: inputs that the text hardly has are not free.
    """
    H = gram.double()
    mean = H.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    H = H / mean + damping * torch.eye(len(H), dtype=torch.float64, device=H.device)
    R = torch.linalg.cholesky(H.flip(0, 1)).flip(0, 1)  # H = R Rᵀ with an upper triangle
    identity = torch.eye(len(H), dtype=torch.float64, device=H.device)
    return torch.linalg.solve_triangular(R, identity, upper=True) / mean.sqrt()


def feedback(W: Tensor, U: Tensor, to: Round, group: int = 1) -> Tensor:
    """`Ŵ`: what `to` makes of each group of columns once the errors before it have been made up for.

    Args:
        W: (n, m).
        U: (m, m), see `whitener`.
        to: rounds a group of columns.
        group: columns that are rounded together, which divides 128.

    Returns:
        (n, m), float32.
    """
    U = U.float()
    n_columns = W.shape[1]
    left = W.float().T.contiguous()  # a column's numbers beside each other
    rounded = torch.empty_like(left)
    for start in range(0, n_columns, _BLOCK):
        stop = min(start + _BLOCK, n_columns)
        errors = torch.empty_like(left[start:stop])
        for at in range(start, stop, group):
            after = min(at + group, stop)
            rounded[at:after] = to(left[at:after].T, at).T
            error = left[at:after] - rounded[at:after]
            if group == 1:
                error /= U[at, at]
            else:
                error = torch.linalg.solve_triangular(U[at:after, at:after].T, error, upper=False)
            errors[at - start : after - start] = error
            left[after:stop].addmm_(U[at:after, after:stop].T, error, alpha=-1)
        left[stop:].addmm_(U[start:stop, stop:].T, errors, alpha=-1)
    return rounded.T
