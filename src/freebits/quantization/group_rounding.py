"""Round to a fixed grid in groups of a row: to the nearest point, or with feedback (GPTQ, Frantar et al. 2022)."""

import torch
from torch import Tensor

from freebits.quantization.error_compensation import compensated_rounding

GROUP = 64


def gridded(W: Tensor, U: Tensor | None, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix (n, m) in integers, (n, m), scales and zeros, (n, groups); see `freebits.codecs.grid.Grid`.

    Args:
        W: the matrix.
        U: see `inverse_factor`; None for no feedback.
        bits: of an integer.
    """
    most = 2**bits - 1
    groups = W.float().split(GROUP, 1)
    lows = torch.stack([group.amin(1).clamp_max(0) for group in groups], 1)
    highs = torch.stack([group.amax(1).clamp_min(0) for group in groups], 1)
    scales = ((highs - lows) / most).clamp_min(2.0**-24).half()
    zeros = (-lows / scales.float()).round().clamp(0, most)

    def to(w: Tensor, at: int) -> Tensor:
        scale, zero = scales[:, at // GROUP, None].float(), zeros[:, at // GROUP, None]
        return ((w / scale + zero).round().clamp(0, most) - zero) * scale

    if U is None:
        rounded = torch.cat([to(group, at * GROUP) for at, group in enumerate(groups)], 1)
    else:
        rounded = compensated_rounding(W, U, to)
    spread = [of.repeat_interleave(GROUP, 1)[:, : W.shape[1]] for of in (scales.float(), zeros)]
    return (rounded / spread[0] + spread[1]).round().to(torch.uint8), scales, zeros.to(torch.uint8)
