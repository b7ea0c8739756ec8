"""Round groups of a row to a grid: to the nearest point, or with error compensation (GPTQ, Frantar et al. 2022)."""

import torch
from torch import Tensor

from freebits.quantization.error_compensation import compensated_rounding

GROUP = 64


def round_to_grid(W: Tensor, U: Tensor | None, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round a matrix (n, m) to integers, (n, m), scales and zeros, (n, groups); see `freebits.codecs.grid.Grid`.

    Args:
        W: the matrix.
        U: see `inverse_factor`; None for no error compensation.
        bits: per integer.
    """
    max_integer = 2**bits - 1
    groups = W.float().split(GROUP, 1)
    lows = torch.stack([group.amin(1).clamp_max(0) for group in groups], 1)
    highs = torch.stack([group.amax(1).clamp_min(0) for group in groups], 1)
    scales = ((highs - lows) / max_integer).clamp_min(2.0**-24).half()
    zeros = (-lows / scales.float()).round().clamp(0, max_integer)

    def round_columns(weights: Tensor, first: int) -> Tensor:
        scale, zero = scales[:, first // GROUP, None].float(), zeros[:, first // GROUP, None]
        return ((weights / scale + zero).round().clamp(0, max_integer) - zero) * scale

    if U is None:
        rounded = torch.cat([round_columns(group, number * GROUP) for number, group in enumerate(groups)], 1)
    else:
        rounded = compensated_rounding(W, U, round_columns)
    column_scales, column_zeros = (
        values.repeat_interleave(GROUP, 1)[:, : W.shape[1]] for values in (scales.float(), zeros)
    )
    return (rounded / column_scales + column_zeros).round().to(torch.uint8), scales, zeros.to(torch.uint8)
