"""Round a matrix column by column, and let the columns to come make up for each error.

The loss is `tr((W - Ŵ) H (W - Ŵ)ᵀ)` for the Gram matrix `H` of the matrix's inputs. GPTQ, LDLQ and Babai's nearest
plane are three names of this algorithm; whatever it rounds to, the loss comes to `Σ_i |w_i - q_i|² / U_ii²`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

_BLOCK = 128
_ACCURACY = 1e-3
Round = Callable[[Tensor, int], Tensor]
"""What some columns, (n, width), starting with a given one, are rounded to."""


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """`U`, upper triangular with `H⁻¹ = Uᵀ U`, (m, m), float32: the Cholesky factor of the inverse Hessian (GPTQ).

    In float32, unless it is not accurate to a thousandth there, then in float64.

    Args:
        gram: `H`, (m, m), positive semi-definite.
        damping: part of its mean diagonal that is added to it: inputs that the text hardly has are not free.
    """
    U = _inverse_factor(gram, damping, torch.float32)
    if U is None:
        U = _inverse_factor(gram, damping, torch.float64)
    if U is None:
        raise ValueError("a Gram matrix that is not positive semi-definite")
    return U.float()


def _inverse_factor(gram: Tensor, damping: float, dtype: torch.dtype) -> Tensor | None:
    """The same in one dtype; None where that is not accurate enough."""
    mean = gram.diagonal().double().mean().clamp_min(torch.finfo(torch.float32).tiny).item()
    H = gram.to(dtype).flip(0, 1).div_(mean)
    H.diagonal().add_(damping)
    L, failed = torch.linalg.cholesky_ex(H)  # of the flipped matrix, so that H = R Rᵀ with an upper triangle R
    if failed:
        return None
    _invert_lower(L)
    v = torch.ones(len(H), dtype=dtype, device=H.device)
    error = (L @ (H @ (L.T @ v)) - v).norm() / v.norm()
    if not error < _ACCURACY:
        return None
    del H
    return L.flip(0, 1).div_(math.sqrt(mean))


def _invert_lower(L: Tensor) -> None:
    """Invert a lower triangle in place, by halves: mostly products, which are fast."""
    n = len(L)
    if n <= _BLOCK:
        L.copy_(torch.linalg.solve_triangular(L, torch.eye(n, dtype=L.dtype, device=L.device), upper=False))
        return
    half = n // 2
    _invert_lower(L[:half, :half])
    _invert_lower(L[half:, half:])
    L[half:, :half] = -(L[half:, half:] @ L[half:, :half]) @ L[:half, :half]


def compensated_rounding(W: Tensor, U: Tensor, to: Round, group: int = 1) -> Tensor:
    """`Ŵ`: what `to` makes of each group of columns once the errors before it have been made up for.

    Args:
        W: (n, m).
        U: (m, m), see `inverse_factor`.
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
