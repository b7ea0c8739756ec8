"""Round to integers of any size. The scales are those with the least expected KL divergence at a given entropy.

A change `Δ` of a matrix causes a KL divergence of about `½ Σ_r f_r Δ_r H Δ_rᵀ` nats per token. `H` is the Gram matrix
of the matrix's inputs. `f_r` is the Fisher information of output `r`, the mean squared gradient at this
output. With error compensation, an error in column `i` is weighted by `1 / U_ii²`, and a scale `s` gives a mean squared
error of `s² / 12`. At high rates, the entropy of an integer falls by one bit if its scale doubles. So the best scales
are `c U_ii / √f_r`, with one `c` for the whole model. Every weight then adds the same `c² / 24` nats to the KL
divergence. The column scales are those of WaterSIC (arXiv 2603.04956).

At low rates, smaller integers are worth an error, because they take fewer bits. The cost of a value `v` for a target
`t`, in units of the scale, is `(t - v)² + λ b`. Here `b` is the number of bits of `v`. For a normal distribution with
variance `σ²`, `b` is a constant plus `v² / (2 σ² ln 2)`. Rounding without this cost has the mean squared error `D`:
1/12, times a factor below 1 with a trellis (`GAINS`). Saving one bit raises this error by `λ = 2 D ln 2`. So the cost
is a constant plus a multiple of `(t / (1 + D / σ²) - v)²`: the target is divided by `1 + D / σ²`, and then rounded as
usual.
"""

import torch
from torch import Tensor

from freebits.codecs.integers import FINENESS, ScaledIntegers, exponents, scales_of, separate_variances
from freebits.quantization.error_compensation import compensated_rounding
from freebits.quantization.trellis import GAINS, trellis_round

DAMPING = 0.03
"""Damping of the Gram matrices; see `inverse_factor`."""
_MAX_INTEGER = 2**28
_MIN_INFORMATION = 1e-4
"""Minimum Fisher information of a row, as a fraction of the mean over all rows."""
_MIN_VARIANCE = 1e-6
"""Minimum variance of the values of a row or column, in units of the squared scale."""
_MIN_SCALE = 0.05
"""Minimum scale of a row without calibration, as a fraction of the root mean square of all weights of the matrix."""


def row_scales(information: Tensor) -> Tensor:
    """Return the relative scale `1 / √f` of each row, (n,), float64, given the Fisher information `f` of each row.

    An `f` below the fraction `_MIN_INFORMATION` of the mean is first raised to this fraction.
    """
    f = information.double()
    floor = max(_MIN_INFORMATION * f.mean().item(), torch.finfo(torch.float32).tiny)
    return f.clamp_min(floor).rsqrt()


def typical_scales(W: Tensor) -> tuple[Tensor, Tensor]:
    """Return the relative scales of rows and columns of a matrix without calibration, (n,) and (m,), float64.

    The scale of a row is the root mean square of its weights, so all rows have the same relative error. (Only rows of
    very small weights get a larger scale; see `_MIN_SCALE`.) All columns have the scale 1.
    """
    rows = W.double().square().mean(1).sqrt()
    floor = max(_MIN_SCALE * rows.square().mean().sqrt().item(), torch.finfo(torch.float32).tiny)
    return rows.clamp_min(floor), torch.ones(W.shape[1], dtype=torch.float64)


def scaled_integers(
    W: Tensor,
    U: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    c: float,
    n_states: int = 0,
    base: Tensor | None = None,
) -> ScaledIntegers:
    """Round a matrix to multiples of the scales or, with a trellis, to multiples of half the scales.

    Args:
        W: matrix to round, (n, m).
        U: inverse-Hessian Cholesky factor, (m, m), see `inverse_factor`; None to round without error compensation.
        rows: relative scales of the rows, (n,), from `row_scales` or, without calibration, from `typical_scales`.
        columns: relative scales of the columns, (m,): the diagonal of `U` or, without calibration, the scales from
            `typical_scales`.
        c: factor of all scales.
        n_states: number of states of the trellis; 0 for no trellis.
        base: matrix to which the rounded matrix will be added, (n, m); the sum will be rounded to the dtype of `base`.
            Error compensation then includes this second rounding error. None if nothing will be added.

    Returns:
        The integers and the exponents of the scales. With a trellis, the integers count halves of a scale, so the
        returned scales are half as large.
    """
    row_exponents, column_exponents = exponents(rows), exponents(c * columns)
    row, column = scales_of(row_exponents)[:, None], scales_of(column_exponents)
    scaled = W.float() / row
    row_variances = separate_variances((scaled / column).square(), _MIN_VARIANCE)[0][:, None]

    def rounded(values: Tensor) -> Tensor:
        """Round columns, (n, k), that are given in units of the scale."""
        variances = row_variances * (values.square() / row_variances).mean(0)
        targets = values / (1 + GAINS[n_states] / 12 / variances.clamp_min(_MIN_VARIANCE))
        clamped = targets.clamp(-_MAX_INTEGER, _MAX_INTEGER)
        return trellis_round(clamped, n_states).float() / 2 if n_states else clamped.round()

    if U is None:
        units = rounded(scaled / column)
    else:
        units = torch.empty_like(scaled)

        def round_column(weights: Tensor, number: int) -> Tensor:
            """Round a column. Keep its integers, and return its values."""
            units[:, [number]] = rounded(weights / column[number])
            values = units[:, [number]] * column[number]
            if base is None:
                return values
            start = base[:, [number]].float()
            return ((start + values * row).to(base.dtype).float() - start) / row

        compensated_rounding(scaled, U, round_column)
    integers = units * (2 if n_states else 1)
    halved = FINENESS if n_states else 0
    return ScaledIntegers(integers.round().to(torch.int32), row_exponents - halved, column_exponents)
