"""Entropy-code integers with different distributions, with asymmetric numeral systems (rANS, Duda 2013).

The *context* of an integer, which the decoder must know, says which distribution the integer has. Each context has a
table of frequencies; neighboring contexts with similar distributions share a table. Each small integer is a symbol. For
a large integer, the symbol gives the position and the value of its three most significant bits. The other bits are
almost random and are stored as they are. Consecutive integers go to consecutive *lanes*, as in `integer_stream`.
"""

import numpy as np
from numpy.typing import NDArray

from freebits.codecs.bits import decompressed, zstd
from freebits.compiled import compiled

N_CONTEXTS = 128
N_SYMBOLS = 128
N_EXACT = 16
"""The integers below this number have a symbol each."""
PRECISION = 12
"""Frequencies are multiples of `2^-12`."""
N_LANES = 32
_UNIT = 16
"""Number of bits of one value of the bitstream."""
_MAX_UNITS = 3
"""An integer takes at most this many values of the bitstream."""
_TABLE_BITS = 400
"""About the number of bits that one more table takes in the stream."""


def encode(integers: NDArray[np.uint32], contexts: NDArray[np.uint8]) -> bytes:
    """Return the coded integers.

    Args:
        integers: (n,), the integers.
        contexts: (n,), their contexts, below `N_CONTEXTS`.
    """
    counts = np.zeros((N_CONTEXTS, N_SYMBOLS), np.int64)
    _count(integers, contexts, counts)
    table_of, counts = _merged(counts)
    frequencies = np.stack([_normalized(row) for row in counts])
    side_data = zstd.compress(table_of.tobytes() + frequencies.astype("<u2").tobytes())
    bitstream = np.empty(_MAX_UNITS * len(integers) + 2 * N_LANES, np.uint16)
    start = _push(integers, contexts, table_of, frequencies, _starts(frequencies), bitstream)
    return len(side_data).to_bytes(4, "little") + side_data + bitstream[start:].astype("<u2").tobytes()


def decode(content: bytes, contexts: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Return the integers, given the same contexts; the inverse of `encode`.

    Raises:
        ValueError: the content is damaged.
    """
    end = 4 + int.from_bytes(content[:4], "little")
    if end > len(content) or (len(content) - end) % 2:
        raise ValueError("the coded integers are cut off")
    table_of, frequencies = _side_data(content[4:end])
    starts = _starts(frequencies)
    symbol_of = np.stack([np.repeat(np.arange(N_SYMBOLS, dtype=np.uint8), row) for row in frequencies])
    integers = np.empty(len(contexts), np.uint32)
    # zeros for one block of integers, because `_pop` checks only before each block whether the bitstream has ended
    bitstream = np.frombuffer(content + bytes(2 * _MAX_UNITS * N_LANES), "<u2", offset=end).astype(np.uint16)
    n_units = len(bitstream) - _MAX_UNITS * N_LANES
    if (
        n_units < 2 * N_LANES
        or _pop(contexts, table_of, symbol_of, frequencies, starts, bitstream, integers) != n_units
    ):
        raise ValueError("the coded integers are damaged")
    return integers


def _side_data(content: bytes) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the index of the table of each context, and the frequencies of each table, (t, `N_SYMBOLS`)."""
    data = decompressed(content, N_CONTEXTS * (1 + 2 * N_SYMBOLS))
    n_tables, n_extra_bytes = divmod(len(data) - N_CONTEXTS, 2 * N_SYMBOLS)
    if n_tables < 1 or n_extra_bytes:
        raise ValueError("the tables of frequencies are cut off")
    table_of = np.frombuffer(data, np.uint8, N_CONTEXTS)
    frequencies = np.frombuffer(data, "<u2", offset=N_CONTEXTS).reshape(n_tables, N_SYMBOLS).astype(np.int64)
    if table_of.max() >= n_tables or (frequencies.sum(axis=1) != 1 << PRECISION).any():
        raise ValueError("the tables of frequencies are damaged")
    return table_of, frequencies


def _starts(frequencies: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each symbol the sum of the frequencies of the earlier symbols in the same table."""
    return np.cumsum(frequencies, axis=1) - frequencies


def _merged(counts: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Merge the tables of neighboring contexts until each further merger would cost more bits than it saves.

    Returns:
        The index of the table of each context, and how often each symbol occurs in each table, (t, `N_SYMBOLS`).
    """
    used = np.flatnonzero(counts.sum(axis=1))
    firsts, tables = list(used), [counts[context] for context in used]
    costs = [_bits(table) for table in tables]
    while len(tables) > 1:
        merged_costs = [_bits(tables[i] + tables[i + 1]) for i in range(len(tables) - 1)]
        losses = [cost - costs[i] - costs[i + 1] for i, cost in enumerate(merged_costs)]
        best = int(np.argmin(losses))
        if losses[best] > _TABLE_BITS:
            break
        tables[best] = tables[best] + tables.pop(best + 1)
        costs[best] = merged_costs[best]
        costs.pop(best + 1)
        firsts.pop(best + 1)
    table_of = np.searchsorted(firsts[1:], np.arange(N_CONTEXTS), side="right").astype(np.uint8)
    return table_of, np.stack(tables) if tables else np.ones((1, N_SYMBOLS), np.int64)


def _bits(counts: NDArray[np.int64]) -> float:
    """Return the number of bits that symbols with these counts take."""
    n = counts[counts > 0].astype(np.float64)
    return float((n * (np.log2(n.sum()) - np.log2(n))).sum())


def _normalized(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return frequencies proportional to the counts. Their sum is `2^PRECISION`. No symbol that occurs gets 0."""
    scaled = counts * ((1 << PRECISION) / counts.sum())
    frequencies = np.where(counts > 0, np.maximum(1, np.round(scaled)), 0).astype(np.int64)
    while excess := int(frequencies.sum()) - (1 << PRECISION):
        # change the frequency whose change costs the fewest bits
        step = 1 if excess < 0 else -1
        candidates = np.flatnonzero(frequencies > (1 if step < 0 else 0))
        losses = counts[candidates] * (np.log2(frequencies[candidates]) - np.log2(frequencies[candidates] + step))
        frequencies[candidates[np.argmin(losses)]] += step
    return frequencies


@compiled
def _count(integers: NDArray[np.uint32], contexts: NDArray[np.uint8], counts: NDArray[np.int64]) -> None:
    """Count how often each symbol occurs in each context."""
    for i in range(len(integers)):
        integer = np.int64(integers[i])
        n_raw = 0
        while integer >> n_raw >= 8 and integer >= N_EXACT:
            n_raw += 1
        counts[contexts[i], integer if not n_raw else 4 * n_raw + 4 + (integer >> n_raw)] += 1


@compiled
def _push(
    integers: NDArray[np.uint32],
    contexts: NDArray[np.uint8],
    table_of: NDArray[np.uint8],
    frequencies: NDArray[np.int64],
    starts: NDArray[np.int64],
    bitstream: NDArray[np.uint16],
) -> int:
    """Write the bitstream, from its end to its start. Return the position of its first value."""
    states, position = np.full(N_LANES, 1 << _UNIT, np.uint64), len(bitstream)
    mask = np.uint64((1 << _UNIT) - 1)
    for i in range(len(integers) - 1, -1, -1):
        integer, state = np.int64(integers[i]), states[i % N_LANES]
        n_raw = 0
        while integer >> n_raw >= 8 and integer >= N_EXACT:
            n_raw += 1
        symbol = integer if not n_raw else 4 * n_raw + 4 + (integer >> n_raw)
        for start in range((n_raw - 1) // _UNIT * _UNIT, -1, -_UNIT):
            n_bits = np.uint64(min(n_raw - start, _UNIT))
            if state >> (np.uint64(2 * _UNIT) - n_bits):
                position -= 1
                bitstream[position] = state & mask
                state >>= np.uint64(_UNIT)
            state = state << n_bits | (np.uint64(integer >> start) & ((np.uint64(1) << n_bits) - np.uint64(1)))
        table = table_of[contexts[i]]
        frequency, first = np.uint64(frequencies[table, symbol]), np.uint64(starts[table, symbol])
        if state >= frequency << np.uint64(2 * _UNIT - PRECISION):
            position -= 1
            bitstream[position] = state & mask
            state >>= np.uint64(_UNIT)
        quotient = state // frequency
        states[i % N_LANES] = (quotient << np.uint64(PRECISION)) + state - quotient * frequency + first
    for lane in range(N_LANES - 1, -1, -1):
        position -= 2
        bitstream[position], bitstream[position + 1] = states[lane] & mask, states[lane] >> np.uint64(_UNIT)
    return position


@compiled
def _pop(
    contexts: NDArray[np.uint8],
    table_of: NDArray[np.uint8],
    symbol_of: NDArray[np.uint8],
    frequencies: NDArray[np.int64],
    starts: NDArray[np.int64],
    bitstream: NDArray[np.uint16],
    integers: NDArray[np.uint32],
) -> int:
    """Decode the integers. Return how many values of the bitstream they take, or -1 if the bitstream is damaged.

    `symbol_of` has the symbol for each table and slot (the lower `PRECISION` bits of a state).
    """
    one, unit, mask = np.uint64(1), np.uint64(_UNIT), np.uint64((1 << _UNIT) - 1)
    states, position = np.empty(N_LANES, np.uint64), 2 * N_LANES
    for lane in range(N_LANES):
        states[lane] = np.uint64(bitstream[2 * lane]) | np.uint64(bitstream[2 * lane + 1]) << unit
    for i in range(len(contexts)):
        if i % N_LANES == 0 and position > len(bitstream) - _MAX_UNITS * N_LANES:
            return -1
        table, state = table_of[contexts[i]], states[i % N_LANES]
        slot = state & np.uint64((1 << PRECISION) - 1)
        symbol = np.int64(symbol_of[table, slot])
        state = (state >> np.uint64(PRECISION)) * np.uint64(frequencies[table, symbol])
        state += slot - np.uint64(starts[table, symbol])
        if state <= mask:
            state = state << unit | np.uint64(bitstream[position])
            position += 1
        if symbol < N_EXACT:
            integer = symbol
        else:
            n_raw = (symbol - 8) // 4
            integer = (symbol - 4 - 4 * n_raw) << n_raw
            for start in range(0, n_raw, _UNIT):
                n_bits = np.uint64(min(int(n_raw) - start, _UNIT))
                integer |= np.int64(state & ((one << n_bits) - one)) << start
                state >>= n_bits
                if state <= mask:
                    state = state << unit | np.uint64(bitstream[position])
                    position += 1
        states[i % N_LANES] = state
        integers[i] = integer
    for lane in range(N_LANES):
        if states[lane] != one << unit:
            return -1
    return position
