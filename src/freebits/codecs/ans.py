"""Code integers with asymmetric numeral systems (rANS, Duda 2013) in many lanes at once.

A lane is a state of 32 bits. One step of coding puts one symbol into each lane, so that NumPy codes thousands at once.
A state that starts empty wastes its first 16 bits. So the symbols are coded in pieces, each over more lanes than the
piece before it. The lanes of a piece start with values from the bitstream of the piece before it (bits-back coding).
Only the few lanes of the first piece start empty.

The integers are roughly normal. An integer is coded with the table of its level: level `v` has the standard deviation
`2^(v / 4)`. Tables are not stored. Encoder and decoder compute them with additions, multiplications and divisions
alone, which IEEE 754 rounds alike on all machines.
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
"""Bits of a probability."""
_UNIT = 16
"""Bits of one value of the bitstream."""
_MIN_LANES, _MAX_LANES, _LANE_GROWTH = 128, 8192, 4
"""Lanes of the first piece, the most lanes of a piece, and the growth from piece to piece."""
_SYMBOLS_PER_NEXT_LANE = 16
"""Symbols of a piece for each lane of the next piece; they give that lane enough bits to start with."""
_MIN_SYMBOLS_PER_LANE = 1536
"""Symbols that a lane must code to be worthwhile; its last state wastes about eight bits."""
_QUARTER_POWERS = (1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429)
"""`2^(i / 4)` for `i` from 0 to 3."""


@dataclass(frozen=True)
class Table:
    """The probabilities of a level's symbols: `0 … 2 radius` for the integers from `-radius`, then the escape.

    Attributes:
        radius: the largest integer that has a symbol.
        frequencies: (symbols,), which sum to `2^PRECISION`.
        starts: (symbols,), the sum of the frequencies before each symbol.
        slot_symbols: (2^PRECISION,), the symbol whose range contains the slot, which is the lower bits of a state.
        slot_updates: (2^PRECISION,), that symbol's frequency (upper 16 bits) and the slot's offset in its range.
    """

    radius: int
    frequencies: NDArray[np.uint64]
    starts: NDArray[np.uint64]
    slot_symbols: NDArray[np.uint16]
    slot_updates: NDArray[np.uint32]


@cache
def table(level: int) -> Table:
    """Return the table of a level: a normal distribution, integrated over the cell of each integer."""
    octave, quarter = divmod(level, LEVELS_PER_OCTAVE)
    deviation = _QUARTER_POWERS[quarter] * 2.0**octave
    radius = int(4.5 * deviation) + 2
    offsets = [(2 * index + 1) / 16 - 0.5 for index in range(8)]
    cells = [sum(_exp(((value + offset) / deviation) ** 2 / 2) for offset in offsets) for value in range(radius + 1)]
    masses = [cells[abs(value)] for value in range(-radius, radius + 1)] + [0.0]
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
    """Return `exp(-x)`. Math libraries differ between machines in the last bit; this function does not."""
    small = x / 1024
    value = 1 - small * (1 - small / 2 * (1 - small / 3 * (1 - small / 4)))
    for _ in range(10):
        value *= value
    return value


def encode(segments: Sequence[tuple[int, Values]]) -> tuple[Bitstream, Values]:
    """Encode segments of integers, each with the table of its level.

    Args:
        segments: level and integers, (n,), of each segment.

    Returns:
        The bitstream; and the escaped integers, which have no symbol, in their order.
    """
    symbols, escaped = [], []
    for level, values in segments:
        radius = table(level).radius
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
            level_table, batch = table(segments[segment][0]), symbols[segment][start : start + n]
            chunks.append(_push(states[:n], level_table.frequencies[batch], level_table.starts[batch]))
        chunks.append(states.astype("<u4").view("<u2"))
        bitstream = np.concatenate(chunks[::-1])
    return bitstream, np.concatenate([np.empty(0, np.int32), *escaped])


def decode(bitstream: Bitstream, segments: Sequence[tuple[int, int]], escaped: Values) -> Iterator[Decoded]:
    """Return the integers of each segment; the inverse of `encode`.

    Args:
        bitstream: as `encode` returned it.
        segments: level and length of each segment.
        escaped: as `encode` returned them.

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
            level_table, out = table(segments[segment][0]), symbols[segment][start : start + n]
            position = _pop(states[:n], level_table, remaining, position, out)
        remaining = np.concatenate([states - np.uint32(1 << _UNIT), remaining[position:]])
    if remaining.any():
        raise ValueError("the bitstream does not end in the state in which coding began")
    return _values(segments, symbols, escaped)


def _push(states: NDArray[np.uint64], frequencies: NDArray[np.uint64], starts: NDArray[np.uint64]) -> Bitstream:
    """Put one symbol into each state, in place; return the lower 16 bits of the states that were full."""
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
    """Take one symbol from each state, in place, into `out`; return the next position in the bitstream."""
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
    """Yield the integers of each segment from its symbols, which it overwrites."""
    start = 0
    for (level, _), segment_symbols in zip(segments, symbols, strict=True):
        radius = table(level).radius
        escapes = (segment_symbols == 2 * radius + 1).nonzero()[0]
        end = start + len(escapes)
        if end > len(escaped):
            raise ValueError(f"there are only {len(escaped)} escaped integers, fewer than escapes")
        values: Decoded = segment_symbols.view(np.int16)
        values -= np.int16(radius)
        if len(escapes):
            values = values.astype(np.int32)
            values[escapes] = escaped[start:end]
        start = end
        yield values
    if start != len(escaped):
        raise ValueError(f"there are {len(escaped)} escaped integers for {start} escapes")


def _pieces(segments: Sequence[tuple[int, int]]) -> list[tuple[list[tuple[int, int, int]], int]]:
    """Return the pieces, the largest first: steps (segment, start in it, number of symbols), and number of lanes."""
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
