"""Asymmetric numeral systems (rANS, Duda 2013) over many lanes at once, with tables that both sides compute.

A lane is a state of 32 bits; a step of coding takes a symbol to each lane, so that NumPy does thousands at once. A
state must start somewhere, which wastes its first 16 bits. Here they are not: symbols are coded in pieces, each over
more lanes than the one before, and the lanes of a piece start with the words in which the piece before it ended (which
is bits-back coding). Only the few lanes of the first piece start empty.

Symbols are whole numbers that are about normal. Their table is that of a level: level `v` has the standard deviation
`2^(v / 4)`. Nothing of a table is stored; it is computed by additions, multiplications and divisions alone, which IEEE
754 rounds alike on all machines.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int32]
Words = NDArray[np.uint16]
Decoded = NDArray[np.int16] | NDArray[np.int32]
States = NDArray[np.uint64]
LEVELS = range(-12, 25)
"""Standard deviations from 1/8 to 64."""
PER_OCTAVE = 4
PRECISION = 14
"""Bits of a probability."""
_WORD = 16
_FEWEST, _MOST, _GROWTH = 128, 8192, 4
"""Lanes of the first piece, of the last, and by how much they grow."""
_STEPS = 16
"""Symbols for each lane of the next piece, so that they leave it enough words."""
_WORTH = 1536
"""Symbols that a lane takes at least; its last state wastes about eight bits."""
_ROOTS = (1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429)
"""Of two, by quarters."""


@dataclass(frozen=True)
class Table:
    """The probabilities of a level's symbols, which are `0 … 2 radius + 1`: numbers from `-radius` on, and last escape.

    Attributes:
        radius: the largest number.
        frequencies: (symbols,), which sum to `2^PRECISION`.
        starts: (symbols,), their sums before each.
        symbols: (2^PRECISION,), the symbol in whose range a number of so many bits lies.
        steps: (2^PRECISION,), of the same its frequency in the upper 16 bits, and where in its range it lies.
    """

    radius: int
    frequencies: NDArray[np.uint64]
    starts: NDArray[np.uint64]
    symbols: NDArray[np.uint16]
    steps: NDArray[np.uint32]


@cache
def table(level: int) -> Table:
    """The table of a level: a normal distribution, summed over the cell of each number."""
    octave, quarter = divmod(level, PER_OCTAVE)
    deviation = _ROOTS[quarter] * 2.0**octave
    radius = int(4.5 * deviation) + 2
    parts = [(2 * part + 1) / 16 - 0.5 for part in range(8)]
    cells = [sum(_exp(((number + part) / deviation) ** 2 / 2) for part in parts) for number in range(radius + 1)]
    masses = [cells[abs(number)] for number in range(-radius, radius + 1)] + [0.0]
    total, free = sum(masses), (1 << PRECISION) - len(masses)
    counts = [1 + int(mass / total * free) for mass in masses]
    counts[radius] += (1 << PRECISION) - sum(counts)
    frequencies = np.array(counts, np.uint64)
    starts = np.cumsum(frequencies) - frequencies
    symbols = np.repeat(np.arange(len(counts), dtype=np.uint16), counts)
    places = np.arange(1 << PRECISION, dtype=np.uint64) - starts[symbols]
    steps = (frequencies[symbols] << np.uint64(_WORD) | places).astype(np.uint32)
    return Table(radius, frequencies, starts, symbols, steps)


def _exp(x: float) -> float:
    """`exp(-x)` without the library's, which differs between machines in the last bit."""
    small = x / 1024
    value = 1 - small * (1 - small / 2 * (1 - small / 3 * (1 - small / 4)))
    for _ in range(10):
        value *= value
    return value


def encode(segments: Sequence[tuple[int, Numbers]]) -> tuple[NDArray[np.uint16], Numbers]:
    """Numbers of one level after those of another.

    Args:
        segments: level and numbers, (n,), of each.

    Returns:
        The words; and the numbers that no table has, in their order.
    """
    symbols, escaped = [], []
    for level, numbers in segments:
        radius = table(level).radius
        large = (numbers > radius) | (numbers < -radius)
        symbols.append(np.where(large, 2 * radius + 1, numbers + radius).astype(np.uint16))
        escaped.append(numbers[large])
    words = np.empty(0, np.uint16)
    for steps, n_lanes in reversed(_pieces([(level, len(numbers)) for level, numbers in segments])):
        states = np.full(n_lanes, 1 << _WORD, np.uint64)
        kept = words[:n_lanes]
        states[: len(kept)] += kept
        words = words[n_lanes:]
        written = [words]
        for segment, at, n in reversed(steps):
            of, symbol = table(segments[segment][0]), symbols[segment][at : at + n]
            written.append(_push(states[:n], of.frequencies[symbol], of.starts[symbol]))
        written.append(states.astype("<u4").view("<u2"))
        words = np.concatenate(written[::-1])
    return words, np.concatenate([np.empty(0, np.int32), *escaped])


def _push(
    states: NDArray[np.uint64], frequencies: NDArray[np.uint64], starts: NDArray[np.uint64]
) -> NDArray[np.uint16]:
    """Take a symbol to each state, in place; the words for which there was no room."""
    full = states >= frequencies << np.uint64(2 * _WORD - PRECISION)
    words = states[full].astype(np.uint16)
    states[full] >>= np.uint64(_WORD)
    quotients = states // frequencies
    states += (quotients << np.uint64(PRECISION)) - quotients * frequencies + starts
    return words


def decode(words: NDArray[np.uint16], segments: Sequence[tuple[int, int]], escaped: Numbers) -> Iterator[Decoded]:
    """The numbers of each segment, inverse of `encode`.

    Args:
        words: what `encode` gave.
        segments: level and length of each.
        escaped: what `encode` gave.

    Raises:
        ValueError: that is not what `encode` gave.
    """
    symbols = [np.empty(n, np.uint16) for _, n in segments]
    left = words.astype(np.uint32)
    for steps, n_lanes in _pieces(segments):
        if len(left) < 2 * n_lanes:
            raise ValueError("a message that is cut off")
        states, at = left[: 2 * n_lanes : 2] | left[1 : 2 * n_lanes : 2] << np.uint32(_WORD), 2 * n_lanes
        for segment, start, n in steps:
            of = table(segments[segment][0])
            at = _pop(states[:n], of, left, at, symbols[segment][start : start + n])
        left = np.concatenate([states - np.uint32(1 << _WORD), left[at:]])
    if left.any():
        raise ValueError("a message that ends in another state than it began")
    return _numbers(segments, symbols, escaped)


def _pop(states: NDArray[np.uint32], of: Table, words: NDArray[np.uint32], at: int, out: NDArray[np.uint16]) -> int:
    """Take a symbol from each state, in place; where the words go on."""
    slots = states & np.uint32((1 << PRECISION) - 1)
    of.symbols.take(slots, out=out, mode="clip")
    steps = of.steps.take(slots, mode="clip")
    states >>= np.uint32(PRECISION)
    states *= steps >> np.uint32(_WORD)
    states += steps & np.uint32((1 << _WORD) - 1)
    low = (states < np.uint32(1 << _WORD)).nonzero()[0]
    if at + len(low) > len(words):
        raise ValueError("a message that is cut off")
    states[low] = states.take(low) << np.uint32(_WORD) | words[at : at + len(low)]
    return at + len(low)


def _numbers(
    segments: Sequence[tuple[int, int]], symbols: list[NDArray[np.uint16]], escaped: Numbers
) -> Iterator[Decoded]:
    at = 0
    for (level, _), symbol in zip(segments, symbols, strict=True):
        radius = table(level).radius
        large = (symbol == 2 * radius + 1).nonzero()[0]
        if at + len(large) > len(escaped):
            raise ValueError("fewer large numbers than there are escapes")
        numbers: Decoded = symbol.view(np.int16)
        numbers -= np.int16(radius)
        if len(large):
            numbers = numbers.astype(np.int32)
            numbers[large] = escaped[at : at + len(large)]
        at += len(large)
        yield numbers
    if at != len(escaped):
        raise ValueError("more large numbers than there are escapes")


def _pieces(segments: Sequence[tuple[int, int]]) -> list[tuple[list[tuple[int, int, int]], int]]:
    """The pieces, the largest first, with its steps (segment, where in it, how many symbols) and its lanes."""
    plan: list[tuple[int, int]] = []
    rest, n_lanes = sum(n for _, n in segments), _FEWEST
    while n_lanes < _MOST and rest >= _WORTH * _GROWTH * n_lanes:
        plan.append((_STEPS * _GROWTH * n_lanes, n_lanes))
        rest -= plan[-1][0]
        n_lanes *= _GROWTH
    plan.append((rest, n_lanes))
    pieces = []
    segment = at = 0
    for size, n_lanes in reversed(plan):
        steps: list[tuple[int, int, int]] = []
        while size:
            if at == segments[segment][1]:
                segment, at = segment + 1, 0
                continue
            n = min(size, n_lanes, segments[segment][1] - at)
            steps.append((segment, at, n))
            at += n
            size -= n
        pieces.append((steps, n_lanes))
    return pieces
