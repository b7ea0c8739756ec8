"""Round groups of a row to points on a pyramid, with scales apart.

Of a normal row of `m` numbers a group of `N` has the share `Beta(N / 2, (m - N) / 2)` of its squared length; scales are
the best for the roots of such numbers. Measured at 3.6 bits in all: of 3 to 6 bits for the scale 3 are best.
"""

import torch
from torch import Tensor

from freebits.codecs import enumeration
from freebits.quantization.error_compensation import compensated_rounding

SCALE_BITS = 3
_ROUNDS = 30
_SIZE = 16


def group_size(n_columns: int) -> int:
    """16, or how many of that divide the columns evenly."""
    return next(size for size in (_SIZE, 8, 4, 2, 1) if n_columns % size == 0)


def pulses(size: int, bits: float) -> int:
    """The most for which points and scales take no more than so many bits per weight; at least one."""
    most = 1
    while most < 128 and enumeration.n_bits(size, most + 1) + SCALE_BITS <= min(bits * size, 62 + SCALE_BITS):
        most += 1
    return most


def pyramids(W: Tensor, U: Tensor, bits: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A matrix (n, m) as points, scales, norms and levels; see `freebits.codecs.pyramid.Pyramid`.

    Args:
        W: the matrix.
        U: see `inverse_factor`.
        bits: for a number, points and scales together.
    """
    n, m = W.shape
    size = group_size(m)
    k = pulses(size, bits)
    norms = W.float().norm(dim=1).half()
    levels = _levels(size, m).half()
    points, scales = torch.zeros(n, m // size, size, dtype=torch.int64), torch.zeros(n, m // size, dtype=torch.uint8)

    def to(w: Tensor, at: int) -> Tensor:
        point = nearest_points(w, k)
        direction = point / point.norm(dim=1, keepdim=True)
        length = (w * direction).sum(1) / norms.float().clamp_min(1e-12)
        scale = torch.bucketize(length.contiguous(), (levels[1:] + levels[:-1]).float() / 2)
        points[:, at // size], scales[:, at // size] = point.long(), scale.to(torch.uint8)
        return direction * (levels.float()[scale] * norms.float())[:, None]

    compensated_rounding(W, U, to, group=size)
    return points, scales, norms, levels


def nearest_points(x: Tensor, pulses: int) -> Tensor:
    """The point of the pyramid in whose direction each vector (n, N) lies most nearly, (n, N), float32.

    Project onto the pyramid, round towards zero, and give what is missing, pulse by pulse, to the coordinate that gains
    most in `(x·y)² / (y·y)`.
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
    """The best `2^SCALE_BITS` lengths (Lloyd 1982), starting with the roots of evenly spaced quantiles."""
    if size == n_columns:
        return torch.ones(2**SCALE_BITS)
    shares = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    log = (size / 2 - 1) * shares.log() + ((n_columns - size) / 2 - 1) * torch.log1p(-shares)
    mass, lengths = (log - log.max()).exp(), shares.sqrt()
    equal = (torch.arange(2**SCALE_BITS, dtype=torch.float64) + 0.5) / 2**SCALE_BITS
    levels = lengths[torch.searchsorted(mass.cumsum(0) / mass.sum(), equal).clamp_max(len(shares) - 1)]
    for _ in range(_ROUNDS):
        cells = torch.bucketize(lengths, (levels[1:] + levels[:-1]) / 2)
        sums = [torch.zeros_like(levels).index_add_(0, cells, of) for of in (mass * lengths, mass)]
        levels = torch.where(sums[1] > 0, sums[0] / sums[1], levels)
    return levels.float()
