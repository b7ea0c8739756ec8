"""Integers of any size at steps that are worth the same everywhere: most fidelity for their entropy.

To second order the model's output moves by `KL = ½ Σ_r f_r Δ_r H Δ_rᵀ` nats per token where a matrix moves by `Δ`, with
the Gram matrix `H` of its inputs and the mean square `f_r` of the gradient at its output `r` (its Fisher information).
After feedback an error in column `i` counts `1 / U_ii²`, and a step `s` makes one of `s² / 12`. At a high rate the
integers' entropy falls by a bit for each doubling of any step, so the best steps are `c U_ii / √f_r`, with one `c` for
the whole model: every number of it then costs the same `c² / 24` nats. (WaterSIC, arXiv 2603.04956, has the part of
the columns.)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from freebits.codecs.integers import ScaledIntegers, exponents, steps
from freebits.quantization.error_compensation import compensated_rounding

DAMPING = 0.03
_MOST = 2**30
_LEAST_INFORMATION = 1e-4
"""Of a row, in means of all rows."""
_LEAST_SCALE = 0.05
"""Of a row, in root mean squares of all rows."""


@dataclass(frozen=True)
class Sensitivity:
    """How much the model's output depends on a matrix.

    Attributes:
        gram: (m, m), mean of `x xᵀ` over its inputs.
        information: (n,), mean of the squared gradient at each output.
    """

    gram: Tensor
    information: Tensor


def row_scales(information: Tensor) -> Tensor:
    """Of each row the step but for that of its columns, `1 / √f`, (n,), float64."""
    f = information.double()
    floor = max(_LEAST_INFORMATION * f.mean().item(), torch.finfo(torch.float32).tiny)
    return f.clamp_min(floor).rsqrt()


def typical_scales(W: Tensor) -> tuple[Tensor, Tensor]:
    """The relative steps of rows and of columns where nothing but a matrix is known, (n,) and (m,), float64.

    Each row is rounded in proportion to the root mean square of its weights, so all are rounded as accurately.
    """
    rows = W.double().square().mean(1).sqrt()
    least = max(_LEAST_SCALE * rows.square().mean().sqrt().item(), torch.finfo(torch.float32).tiny)
    return rows.clamp_min(least), torch.ones(W.shape[1], dtype=torch.float64)


def scaled_integers(W: Tensor, U: Tensor | None, rows: Tensor, columns: Tensor, c: float) -> ScaledIntegers:
    """A matrix in integers.

    Args:
        W: (n, m).
        U: (m, m), see `inverse_factor`; None to round each weight to the nearest.
        rows: (n,), see `row_scales`.
        columns: (m,), the diagonal of `U`, or see `typical_scales`.
        c: the step where nothing else counts.
    """
    row_exponents, column_exponents = exponents(rows), exponents(c * columns)
    row, column = steps(row_exponents)[:, None], steps(column_exponents)
    scaled = W.float() / row
    if U is not None:
        scaled = compensated_rounding(scaled, U, lambda w, at: (w / column[at]).round() * column[at])
    return ScaledIntegers(
        (scaled / column).round().clamp(-_MOST, _MOST).to(torch.int32), row_exponents, column_exponents
    )
