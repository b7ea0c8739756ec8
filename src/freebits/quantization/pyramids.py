"""Round each group of weights in a row to a point on a pyramid, with a separate scale for each group.

A pyramid consists of the integer vectors whose absolute values have a given sum, the number of *pulses*. In a row of
`m` normally distributed weights, a group of `N` weights has a share of the squared length of the row. This share has
the distribution `Beta(N / 2, (m - N) / 2)`. A scale selects a level, which is the length of a group relative to the
row. The levels have the least mean squared error for the square root of the share. At 3.6 bits per weight, 3 bits per
scale gave the best results among 3 to 6 bits.
"""

import torch
from torch import Tensor

from freebits.codecs import enumeration
from freebits.quantization.error_compensation import compensated_rounding

SCALE_BITS = 3
_ROUNDS = 30
_SIZE = 16
_INDEX_BITS, _MAX_PULSES = 62, 256  # limits of the code `pyramid`


def group_size(n_columns: int, bits: float) -> int:
    """Return the number of weights per group.

    It is the largest power of two, up to 16, that divides the number of columns and for which a point fits in 62 bits.
    """
    sizes = (size for size in (_SIZE, 8, 4, 2) if n_columns % size == 0 and bits * size <= _INDEX_BITS + SCALE_BITS)
    return next(sizes, 1)


def max_pulses(size: int, bits: float) -> int:
    """Return the largest number of pulses, 1 to 256, with which points and scales fit in `bits` bits per weight."""
    pulses = 1
    while pulses < _MAX_PULSES and enumeration.n_bits(size, pulses + 1) + SCALE_BITS <= bits * size:
        pulses += 1
    return pulses


def round_to_pyramids(W: Tensor, U: Tensor, bits: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Round a matrix to points, scales, norms and levels; see `Pyramid.encode` in `freebits.codecs.pyramid`.

    Args:
        W: matrix to round, (n, m).
        U: inverse-Hessian Cholesky factor, (m, m), see `inverse_factor`.
        bits: maximum bits per weight for points and scales together.
    """
    n, m = W.shape
    size = group_size(m, bits)
    pulses = max_pulses(size, bits)
    norms = W.float().norm(dim=1).half()
    levels = _levels(size, m).half()
    points, scales = torch.zeros(n, m // size, size, dtype=torch.int64), torch.zeros(n, m // size, dtype=torch.uint8)

    def round_group(weights: Tensor, first: int) -> Tensor:
        point = nearest_points(weights, pulses)
        direction = point / point.norm(dim=1, keepdim=True)
        length = (weights * direction).sum(1) / norms.float().clamp_min(1e-12)
        scale = torch.bucketize(length.contiguous(), (levels[1:] + levels[:-1]).float() / 2)
        points[:, first // size], scales[:, first // size] = point.long(), scale.to(torch.uint8)
        return direction * (levels.float()[scale] * norms.float())[:, None]

    compensated_rounding(W, U, round_group, group=size)
    return points, scales, norms, levels


def nearest_points(x: Tensor, pulses: int) -> Tensor:
    """Return for each vector, (n, N), the pyramid point with approximately the closest direction, (n, N), float32.

    The function projects a vector `x` onto the pyramid and rounds the result towards zero to a point `y`. Then it
    assigns the missing pulses one by one, each to the coordinate that increases `(x·y)² / (y·y)` most.
    """
    size = x.float().abs()
    size = torch.where(size.sum(1, keepdim=True) > 0, size, torch.ones_like(size))
    y = (pulses * size / size.sum(1, keepdim=True)).floor()
    missing = pulses - y.sum(1)
    inner, length = (size * y).sum(1), y.square().sum(1)
    while (active := torch.nonzero(missing > 0)[:, 0]).numel():
        a, b = size[active], y[active]
        gain = (inner[active, None] + a).square() / (length[active, None] + 2 * b + 1)
        best = gain.argmax(1)
        inner[active] += a.gather(1, best[:, None])[:, 0]
        length[active] += 2 * b.gather(1, best[:, None])[:, 0] + 1
        y[active, best] += 1
        missing[active] -= 1
    return torch.where(x < 0, -y, y)


def _levels(size: int, n_columns: int) -> Tensor:
    """Return the levels for groups of `size` weights in rows of `n_columns`, (2^SCALE_BITS,), float32 (Lloyd 1982).

    The iteration starts from the square roots of evenly spaced quantiles of the share.
    """
    if size == n_columns:
        return torch.ones(2**SCALE_BITS)
    shares = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    log_density = (size / 2 - 1) * shares.log() + ((n_columns - size) / 2 - 1) * torch.log1p(-shares)
    mass, lengths = (log_density - log_density.max()).exp(), shares.sqrt()
    quantiles = (torch.arange(2**SCALE_BITS, dtype=torch.float64) + 0.5) / 2**SCALE_BITS
    levels = lengths[torch.searchsorted(mass.cumsum(0) / mass.sum(), quantiles).clamp_max(len(shares) - 1)]
    for _ in range(_ROUNDS):
        cells = torch.bucketize(lengths, (levels[1:] + levels[:-1]) / 2)
        moments, masses = (torch.zeros_like(levels).index_add_(0, cells, values) for values in (mass * lengths, mass))
        levels = torch.where(masses > 0, moments / masses, levels)
    return levels.float()
