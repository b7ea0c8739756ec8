"""Round a matrix column by column, and correct later columns for the error of each rounded column (GPTQ).

The loss is `tr((W - Ŵ) H (W - Ŵ)ᵀ)` for the damped Gram matrix `H` of the matrix's inputs. GPTQ, LDLQ and Babai's
nearest plane are three names of this algorithm. Let `w_i` be a corrected column and `q_i` the rounded column. If
columns are rounded one at a time, by any function, the loss equals `Σ_i |w_i - q_i|² / U_ii²`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

_BLOCK = 128
_MAX_ERROR = 1e-3
RoundColumns = Callable[[Tensor, int], Tensor]
"""Takes consecutive columns, (n, width), and the number of the first column. Returns the rounded columns."""


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """Return the inverse-Hessian Cholesky factor: upper triangular `U`, (m, m), float32.

    `H⁻¹ = Uᵀ U` for the damped Gram matrix `H`.

    The function computes in float32. If the factorization fails in float32, or if its relative error is above a
    thousandth, the function computes again in float64.

    Args:
        gram: Gram matrix, (m, m), positive semi-definite.
        damping: fraction of the mean of the diagonal that is added to the diagonal, so that errors in rare input
            directions count.

    Raises:
        ValueError: the float64 result is not accurate enough either, because the Gram matrix is not positive
            semi-definite.
    """
    U = _inverse_factor(gram, damping, torch.float32)
    if U is None:
        U = _inverse_factor(gram, damping, torch.float64)
    if U is None:
        raise ValueError("the Gram matrix is not positive semi-definite")
    return U.float()


def _inverse_factor(gram: Tensor, damping: float, dtype: torch.dtype) -> Tensor | None:
    """Return the inverse-Hessian Cholesky factor, computed in one dtype; None if this fails or is inaccurate."""
    mean = gram.diagonal().double().mean().clamp_min(torch.finfo(torch.float32).tiny).item()
    H = gram.to(dtype).flip(0, 1).div_(mean)
    H.diagonal().add_(damping)
    # `H` is flipped here. Flipping `L` back gives an upper triangular `R`, and the damped Gram matrix is `R Rᵀ`.
    # So `U` is the inverse of `R`.
    L, failed = torch.linalg.cholesky_ex(H)
    if failed:
        return None
    _invert_lower(L)
    v = torch.ones(len(H), dtype=dtype, device=H.device)
    error = (L @ (H @ (L.T @ v)) - v).norm() / v.norm()
    if not error < _MAX_ERROR:
        return None
    del H
    return L.flip(0, 1).div_(math.sqrt(mean))


def _invert_lower(L: Tensor) -> None:
    """Invert a lower triangular matrix in place.

    The function inverts the two diagonal blocks recursively, because then most of the work is matrix products, which
    are fast.
    """
    n = len(L)
    if n <= _BLOCK:
        L.copy_(torch.linalg.solve_triangular(L, torch.eye(n, dtype=L.dtype, device=L.device), upper=False))
        return
    half = n // 2
    _invert_lower(L[:half, :half])
    _invert_lower(L[half:, half:])
    L[half:, :half] = -(L[half:, half:] @ L[half:, :half]) @ L[:half, :half]


def compensated_rounding(W: Tensor, U: Tensor, round_columns: RoundColumns, group: int = 1) -> Tensor:
    """Round a matrix in groups of columns, and correct each group for the errors of the groups before it.

    Args:
        W: matrix to round, (n, m).
        U: inverse-Hessian Cholesky factor, (m, m), see `inverse_factor`.
        round_columns: function that rounds a group of columns.
        group: number of columns that are rounded together, a divisor of 128.

    Returns:
        The rounded matrix `Ŵ`, (n, m), float32.
    """
    U = U.float()
    n_columns = W.shape[1]
    corrected = W.float().T.contiguous()  # each column is contiguous in memory
    rounded = torch.empty_like(corrected)
    for start in range(0, n_columns, _BLOCK):
        stop = min(start + _BLOCK, n_columns)
        errors = torch.empty_like(corrected[start:stop])
        for first in range(start, stop, group):
            end = min(first + group, stop)
            rounded[first:end] = round_columns(corrected[first:end].T, first).T
            error = corrected[first:end] - rounded[first:end]
            if group == 1:
                error /= U[first, first]
            else:
                error = torch.linalg.solve_triangular(U[first:end, first:end].T, error, upper=False)
            errors[first - start : end - start] = error
            corrected[end:stop].addmm_(U[first:end, end:stop].T, error, alpha=-1)
        corrected[stop:].addmm_(U[start:stop, stop:].T, errors, alpha=-1)
    return rounded.T
