"""Probability tables of rounded normal variables, for the entropy coder in `integer_stream`.

Level `v` stands for the standard deviation `2^(v / 4)`. Tables are not stored. Encoder and decoder compute them using
only additions, multiplications and divisions of float64, because IEEE 754 rounds these in the same way on all machines.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

LEVELS = range(-12, 25)
"""The levels that have a table: standard deviations from 1/8 to 64."""
LEVELS_PER_OCTAVE = 4
PRECISION = 14
"""Number of bits of a frequency: probabilities are multiples of `2^-PRECISION`."""
ESCAPE = -(2**15)
"""The value in `Tables.symbols` that marks the escape symbol, which stands for no single integer."""
MAX_SYMBOLS = 640
"""Upper bound on the number of symbols of a table."""
BUCKET_BITS = 3
"""A *bucket* is a range of `2^BUCKET_BITS` slots; see `Tables`."""
_SHIFTS = (0.0, -0.5)
"""Mean of the integers `k` in even states of a trellis, and mean in odd states; see `freebits.codecs.trellis`."""
_QUARTER_POWERS = (1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429)
"""`2^(i / 4)` for `i` from 0 to 3."""


def frequencies(level: int, shift: float) -> NDArray[np.int64]:
    """Return the frequencies of the symbols of a level, (2 R + 2,). Their sum is `2^PRECISION`.

    The symbols stand for the integers from `-R` to `R`. The last symbol, the *escape*, stands for any other integer.

    Args:
        level: the level; see the module's docstring.
        shift: mean of the normal distribution.
    """
    octave, quarter = divmod(level, LEVELS_PER_OCTAVE)
    deviation = _QUARTER_POWERS[quarter] * 2.0**octave
    radius = int(4.5 * deviation) + 2
    distances = np.abs(np.arange(-radius, radius + 1) - shift)
    masses = np.zeros(2 * radius + 1)
    for index in range(8):  # integrate over the interval around each integer
        masses += _exp(((distances + ((2 * index + 1) / 16 - 0.5)) / deviation) ** 2 / 2)
    total = np.cumsum(masses)[-1]  # adds in order; the order in which `sum` adds depends on NumPy's version
    counts = 1 + np.append(masses / total * ((1 << PRECISION) - 2 * radius - 2), 0.0).astype(np.int64)
    counts[radius] += (1 << PRECISION) - counts.sum()
    return counts


def _exp(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Approximate `exp(-x)`, with the same result on all machines; math libraries differ in the last bits."""
    small = x / 1024
    value = 1 - small * (1 - small / 2 * (1 - small / 3 * (1 - small / 4)))
    for _ in range(10):
        value = value * value
    return value


@dataclass(frozen=True)
class Tables:
    """All tables, for compiled loops.

    Table `2 i` belongs to level `LEVELS[i]` with mean 0, and table `2 i + 1` to this level with mean -1/2. The lower
    `PRECISION` bits of a coder's state are its *slot*. Each symbol has a range of slots.

    Attributes:
        radii: (tables,), the largest integer that has a symbol.
        symbols: (tables * MAX_SYMBOLS,), for each symbol its integer or `ESCAPE` (bits 32 to 63), its number of slots
            (bits 16 to 31), and its first slot (bits 0 to 15).
        buckets: (tables * 2^(PRECISION - BUCKET_BITS),), the symbol of the first slot of each bucket.
    """

    radii: NDArray[np.int32]
    symbols: NDArray[np.uint64]
    buckets: NDArray[np.uint16]


@cache
def tables() -> Tables:
    """Return all tables."""
    all_symbols, all_buckets, radii = [], [], []
    for level in LEVELS:
        for shift in _SHIFTS:
            counts = frequencies(level, shift)
            radius, starts = len(counts) // 2 - 1, np.cumsum(counts) - counts
            integers = np.append(np.arange(-radius, radius + 1), ESCAPE)
            symbols = np.zeros(MAX_SYMBOLS, np.int64)
            symbols[: len(counts)] = integers << 32 | counts << 16 | starts
            first_slots = np.arange(0, 1 << PRECISION, 1 << BUCKET_BITS)
            all_buckets.append((np.searchsorted(starts, first_slots, side="right") - 1).astype(np.uint16))
            all_symbols.append(symbols)
            radii.append(radius)
    return Tables(np.array(radii, np.int32), np.concatenate(all_symbols).view(np.uint64), np.concatenate(all_buckets))
