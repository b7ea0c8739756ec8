"""Code integers with asymmetric numeral systems (rANS, Duda 2013) in many lanes at once.

A *lane* is a coder with its own state of 32 bits. One step of coding puts one symbol into each lane, so that NumPy
codes thousands of symbols at once. A state that starts empty wastes its first 16 bits. The symbols are therefore coded
in *pieces*, each with more lanes than the piece before it. The states of a piece start with values from the bitstream
of the piece before it (bits-back coding). Only the few lanes of the first piece start empty.

The integers have roughly a normal distribution. Each integer has a *level*: level `v` stands for the standard deviation
`2^(v / 4)` and has its own table of probabilities. Tables are not stored. Encoder and decoder compute them using only
additions, multiplications and divisions, because IEEE 754 rounds these in the same way on all machines.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.int32]
Bitstream = NDArray[np.uint16]
Decoded = NDArray[np.int16] | NDArray[np.int32]
LEVELS = range(-12, 25)
"""The levels that have a table: standard deviations from 1/8 to 64."""
LEVELS_PER_OCTAVE = 4
PRECISION = 14
"""Number of bits of a probability."""
_UNIT = 16
"""Number of bits of one value of the bitstream."""
_MIN_LANES, _MAX_LANES, _LANE_GROWTH = 128, 8192, 4
"""Lanes of the first piece, lanes of the largest piece, and the growth factor of lanes from piece to piece."""
_SYMBOLS_PER_NEXT_LANE = 16
"""A piece codes this many symbols per lane of the next piece, so that its bitstream can start all of these lanes."""
_MIN_SYMBOLS_PER_LANE = 1536
"""Minimum number of symbols per lane. A lane with fewer does not pay: its last state wastes about eight bits."""
_QUARTER_POWERS = (1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429)
"""`2^(i / 4)` for `i` from 0 to 3."""


@dataclass(frozen=True)
class Table:
    """The probabilities of the symbols of a level.

    Symbols 0 to `2 radius` stand for the integers `-radius` to `radius`. The last symbol, the *escape*, stands for any
    other integer. The lower `PRECISION` bits of a state are its *slot*. Each symbol has a range of slots.

    Attributes:
        radius: the largest integer that has a symbol.
        frequencies: (symbols,), the number of slots of each symbol; the sum is `2^PRECISION`.
        starts: (symbols,), the first slot of each symbol.
        slot_symbols: (2^PRECISION,), the symbol of each slot.
        slot_updates: (2^PRECISION,), the frequency of the symbol of each slot (upper 16 bits) and the offset of the
            slot in the range of the symbol (lower 16 bits).
    """

    radius: int
    frequencies: NDArray[np.uint64]
    starts: NDArray[np.uint64]
    slot_symbols: NDArray[np.uint16]
    slot_updates: NDArray[np.uint32]


@cache
def table(level: int, mean: float = 0.0) -> Table:
    """Compute the table of a level by integrating a normal distribution over the interval around each integer.

    Args:
        level: the level; see the module's docstring.
        mean: mean of the distribution.
    """
    octave, quarter = divmod(level, LEVELS_PER_OCTAVE)
    deviation = _QUARTER_POWERS[quarter] * 2.0**octave
    radius = int(4.5 * deviation) + 2
    offsets = [(2 * index + 1) / 16 - 0.5 for index in range(8)]
    masses = [
        sum(_exp(((abs(value - mean) + offset) / deviation) ** 2 / 2) for offset in offsets)
        for value in range(-radius, radius + 1)
    ]
    masses.append(0.0)
    total, n_free = sum(masses), (1 << PRECISION) - len(masses)
    counts = [1 + int(mass / total * n_free) for mass in masses]
    counts[radius] += (1 << PRECISION) - sum(counts)
    frequencies = np.array(counts, np.uint64)
    starts = np.cumsum(frequencies) - frequencies
    slot_symbols = np.repeat(np.arange(len(counts), dtype=np.uint16), counts)
    slot_offsets = np.arange(1 << PRECISION, dtype=np.uint64) - starts[slot_symbols]
    slot_updates = (frequencies[slot_symbols] << np.uint64(_UNIT) | slot_offsets).astype(np.uint32)
    return Table(radius, frequencies, starts, slot_symbols, slot_updates)


def _exp(x: float) -> float:
    """Return `exp(-x)`, the same on all machines; the results of math libraries differ in the last bit."""
    small = x / 1024
    value = 1 - small * (1 - small / 2 * (1 - small / 3 * (1 - small / 4)))
    for _ in range(10):
        value *= value
    return value


def encode(segments: Sequence[tuple[int, Values]], mean: float = 0.0) -> tuple[Bitstream, Values]:
    """Encode segments of integers, each with the table of its level.

    Args:
        segments: pairs of a level and integers, (n,).
        mean: mean of the integers. It must be a multiple of 1/4, so that the tables are the same on all machines.

    Returns:
        The bitstream, and the escaped integers in their order. An integer is escaped if its table has no symbol for it.
    """
    symbols, escaped = [], []
    for level, values in segments:
        radius = table(level, mean).radius
        is_escaped = (values > radius) | (values < -radius)
        symbols.append(np.where(is_escaped, 2 * radius + 1, values + radius).astype(np.uint16))
        escaped.append(values[is_escaped])
    bitstream = np.empty(0, np.uint16)
    for steps, n_lanes in reversed(_pieces([(level, len(values)) for level, values in segments])):
        states = np.full(n_lanes, 1 << _UNIT, np.uint64)
        start_bits = bitstream[:n_lanes]
        states[: len(start_bits)] += start_bits
        chunks = [bitstream[n_lanes:]]
        for segment, start, n in reversed(steps):
            level_table, batch = table(segments[segment][0], mean), symbols[segment][start : start + n]
            chunks.append(_push(states[:n], level_table.frequencies[batch], level_table.starts[batch]))
        chunks.append(states.astype("<u4").view("<u2"))
        bitstream = np.concatenate(chunks[::-1])
    return bitstream, np.concatenate([np.empty(0, np.int32), *escaped])


def decode(
    bitstream: Bitstream, segments: Sequence[tuple[int, int]], escaped: Values, mean: float = 0.0
) -> Iterator[Decoded]:
    """Return the integers of each segment; the inverse of `encode`.

    Args:
        bitstream: the bitstream that `encode` returned.
        segments: pairs of the level and the length of a segment.
        escaped: the escaped integers that `encode` returned.
        mean: the mean that `encode` got.

    Raises:
        ValueError: the bitstream or the escaped integers are damaged.
    """
    symbols = [np.empty(n, np.uint16) for _, n in segments]
    remaining = bitstream.astype(np.uint32)
    for steps, n_lanes in _pieces(segments):
        if len(remaining) < 2 * n_lanes:
            raise ValueError("the bitstream is cut off")
        position = 2 * n_lanes
        states = remaining[:position:2] | remaining[1:position:2] << np.uint32(_UNIT)
        for segment, start, n in steps:
            level_table, out = table(segments[segment][0], mean), symbols[segment][start : start + n]
            position = _pop(states[:n], level_table, remaining, position, out)
        remaining = np.concatenate([states - np.uint32(1 << _UNIT), remaining[position:]])
    if remaining.any():
        raise ValueError("the bitstream does not end in the initial state of the encoder")
    return _values(segments, symbols, escaped)


def _push(states: NDArray[np.uint64], frequencies: NDArray[np.uint64], starts: NDArray[np.uint64]) -> Bitstream:
    """Put one symbol into each state, in place. Return the lower 16 bits of the states that were full."""
    is_full = states >= frequencies << np.uint64(2 * _UNIT - PRECISION)
    output = states[is_full].astype(np.uint16)
    states[is_full] >>= np.uint64(_UNIT)
    quotients = states // frequencies
    states += (quotients << np.uint64(PRECISION)) - quotients * frequencies + starts
    return output


def _pop(
    states: NDArray[np.uint32],
    level_table: Table,
    bitstream: NDArray[np.uint32],
    position: int,
    out: NDArray[np.uint16],
) -> int:
    """Take one symbol from each state, in place, and write it to `out`. Return the next position in the bitstream."""
    slots = states & np.uint32((1 << PRECISION) - 1)
    level_table.slot_symbols.take(slots, out=out, mode="clip")
    updates = level_table.slot_updates.take(slots, mode="clip")
    states >>= np.uint32(PRECISION)
    states *= updates >> np.uint32(_UNIT)
    states += updates & np.uint32((1 << _UNIT) - 1)
    low = (states < np.uint32(1 << _UNIT)).nonzero()[0]
    end = position + len(low)
    if end > len(bitstream):
        raise ValueError("the bitstream is cut off")
    states[low] = states.take(low) << np.uint32(_UNIT) | bitstream[position:end]
    return end


def _values(
    segments: Sequence[tuple[int, int]], symbols: list[NDArray[np.uint16]], escaped: Values
) -> Iterator[Decoded]:
    """Convert the symbols of each segment, in place, to integers, and yield the integers."""
    start = 0
    for (level, _), segment_symbols in zip(segments, symbols, strict=True):
        radius = table(level).radius
        escapes = (segment_symbols == 2 * radius + 1).nonzero()[0]
        end = start + len(escapes)
        if end > len(escaped):
            raise ValueError(f"there are more escape symbols than the {len(escaped)} escaped integers")
        values: Decoded = segment_symbols.view(np.int16)
        values -= np.int16(radius)
        if len(escapes):
            values = values.astype(np.int32)
            values[escapes] = escaped[start:end]
        start = end
        yield values
    if start != len(escaped):
        raise ValueError(f"there are {len(escaped)} escaped integers for {start} escape symbols")


def _pieces(segments: Sequence[tuple[int, int]]) -> list[tuple[list[tuple[int, int, int]], int]]:
    """Return the steps and the number of lanes of each piece, in decoding order: the last piece first.

    A step is a tuple of the index of a segment, the start in this segment, and the number of symbols.
    """
    plan: list[tuple[int, int]] = []
    n_remaining, n_lanes = sum(n for _, n in segments), _MIN_LANES
    while n_lanes < _MAX_LANES and n_remaining >= _MIN_SYMBOLS_PER_LANE * _LANE_GROWTH * n_lanes:
        plan.append((_SYMBOLS_PER_NEXT_LANE * _LANE_GROWTH * n_lanes, n_lanes))
        n_remaining -= plan[-1][0]
        n_lanes *= _LANE_GROWTH
    plan.append((n_remaining, n_lanes))
    pieces = []
    segment = start = 0
    for n_remaining, n_lanes in reversed(plan):
        steps: list[tuple[int, int, int]] = []
        while n_remaining:
            if start == segments[segment][1]:
                segment, start = segment + 1, 0
                continue
            n = min(n_remaining, n_lanes, segments[segment][1] - start)
            steps.append((segment, start, n))
            start += n
            n_remaining -= n
        pieces.append((steps, n_lanes))
    return pieces
