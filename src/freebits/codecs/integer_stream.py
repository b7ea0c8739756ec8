"""Entropy-code matrices of integers with asymmetric numeral systems (rANS, Duda 2013).

Consecutive integers go to consecutive *lanes*. A lane is a coder with its own state of 32 bits, so that a processor can
work on several integers at once. All lanes write to one bitstream of 16-bit values.

The integers have roughly a normal distribution. The *level* of an integer is the logarithm of its expected standard
deviation, in quarters of an octave (a factor of 2). It is the sum of the levels of the integer's row and column. The
level of an integer selects its table of probabilities; see `normal_tables`. If the level is above that of the last
table, the lower bits of the integer are almost random. These bits are stored as they are, and the upper bits are coded
with one of the last tables.

With a trellis (see `trellis`), an integer is `2 k + s`. Here `s` is the parity of the state of its column, so only `k`
is coded, and the level is that of `k`.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from freebits.codecs.normal_tables import BUCKET_BITS, ESCAPE, LEVELS, LEVELS_PER_OCTAVE, MAX_SYMBOLS, PRECISION, tables
from freebits.codecs.trellis import transitions
from freebits.compiled import compiled

Matrix = tuple[NDArray[np.int32], NDArray[np.int8], NDArray[np.int8]]
"""Integers, (n, m), the levels of the rows, (n,), and the levels of the columns, (m,)."""
N_LANES = 32
_MIN_LEVEL, _TOP_LEVEL = LEVELS[0], LEVELS[-1]
_MAX_LEVEL = _TOP_LEVEL + 18 * LEVELS_PER_OCTAVE
"""The largest level, of integers whose standard deviation is `2^24`. Larger sums of levels are reduced to it."""
_UNIT = 16
"""Number of bits of one value of the bitstream."""
_MAX_UNITS = 4
"""An integer takes at most this many values of the bitstream."""


def encode(matrices: Sequence[Matrix], trellis: bool) -> NDArray[np.uint16]:
    """Return the bitstream, (length,), of some matrices. `trellis` says whether integers are on paths of a trellis."""
    n = sum(integers.size for integers, _, _ in matrices)
    bitstream = np.empty(_MAX_UNITS * n + 2 * N_LANES, np.uint16)
    states, position = np.full(N_LANES, 1 << _UNIT, np.uint32), len(bitstream)  # the encoder writes backwards
    for integers, row_levels, column_levels in reversed(matrices):
        n -= integers.size
        levels = row_levels.astype(np.int64), column_levels.astype(np.int64)
        all_tables = tables()
        position = _push(
            integers, *levels, int(trellis), all_tables.radii, all_tables.symbols, states, n, bitstream, position
        )
    position -= 2 * N_LANES
    bitstream[position : position + 2 * N_LANES] = states.astype("<u4").view("<u2")
    return bitstream[position:].copy()


class Decoder:
    """Decodes matrices from a bitstream, in order and some rows at a time.

    Args:
        bitstream: what `encode` returned.
        width: number of columns of the widest matrix.
        n_states: number of states of the trellis, or 0.

    Raises:
        ValueError: the bitstream is cut off. The methods also raise this error if the bitstream is damaged.
    """

    def __init__(self, bitstream: NDArray[np.uint16], width: int, n_states: int) -> None:
        if len(bitstream) < 2 * N_LANES:
            raise ValueError("the bitstream is cut off")
        self._states = bitstream[: 2 * N_LANES].astype("<u2").view("<u4").astype(np.uint32)
        self._end = len(bitstream)
        # zeros for one row, because `_pop` checks only after each row whether the bitstream has ended
        self._bitstream = np.append(bitstream, np.zeros(_MAX_UNITS * width, np.uint16))
        self._position, self._n_decoded = 2 * N_LANES, 0
        self._following = transitions(n_states).reshape(-1)

    def decode(
        self,
        row_levels: NDArray[np.int8],
        column_levels: NDArray[np.int8],
        column_states: NDArray[np.uint8],
        integers: NDArray[np.int32],
        floats: NDArray[np.float32],
        row_scales: NDArray[np.float32],
        column_scales: NDArray[np.float32],
    ) -> None:
        """Decode the next rows.

        Args:
            row_levels: levels of the next rows, (n,).
            column_levels: levels of the columns, (m,).
            column_states: state of the trellis in each column, (m,), before the next rows. The method replaces the
                states with those after these rows.
            integers: array to fill, (n, m), or (1, m) if only `floats` are needed.
            floats: array to fill, (n, m), or (0, m) if only `integers` are needed.
            row_scales: factors of the rows of the floats, (n,); not used if `floats` has no rows.
            column_scales: factors of the columns of the floats, (m,); not used if `floats` has no rows.
        """
        levels, all_tables = (row_levels.astype(np.int64), column_levels.astype(np.int64)), tables()
        self._position = _pop(
            *levels,
            all_tables.buckets,
            all_tables.symbols,
            self._states,
            self._n_decoded,
            self._bitstream,
            self._position,
            self._end,
            self._following,
            column_states,
            integers,
            floats,
            row_scales,
            column_scales,
        )
        if self._position > self._end:
            raise ValueError("the bitstream is cut off or damaged")
        self._n_decoded += len(row_levels) * len(column_levels)

    def finish(self) -> None:
        """Check that the bitstream ends here.

        Raises:
            ValueError: the bitstream does not end here, or is damaged.
        """
        if self._position != self._end or (self._states != 1 << _UNIT).any():
            raise ValueError("the bitstream is damaged: it does not end in the initial states of the encoder")


@compiled
def _push(
    integers: NDArray[np.int32],
    row_levels: NDArray[np.int64],
    column_levels: NDArray[np.int64],
    trellis: int,
    radii: NDArray[np.int32],
    symbols: NDArray[np.uint64],
    states: NDArray[np.uint32],
    n_before: int,
    bitstream: NDArray[np.uint16],
    position: int,
) -> int:
    """Put a matrix into the states, in place, from its last integer to its first.

    `n_before` is the number of integers of earlier matrices. Before a state would exceed 32 bits, its lower 16 bits
    become a value of the bitstream. The first such value goes before `position`, and each further value before the
    previous one. Return the position of the value that was written last, or `position` if no value was written.
    """
    n_rows, n_columns = integers.shape
    for row in range(n_rows - 1, -1, -1):
        for column in range(n_columns - 1, -1, -1):
            level = min(max(row_levels[row] + column_levels[column], _MIN_LEVEL), _MAX_LEVEL)
            n_raw = max(0, -((_TOP_LEVEL - level) // LEVELS_PER_OCTAVE))
            raw, shift = np.int64(integers[row, column]), np.int64(0)
            if trellis:
                raw, shift = raw >> 1, raw & 1
            table = 2 * (level - LEVELS_PER_OCTAVE * n_raw - _MIN_LEVEL) + shift
            symbol = (raw >> n_raw) + radii[table]
            if symbol < 0 or symbol > 2 * radii[table]:
                symbol, n_raw = 2 * np.int64(radii[table]) + 1, np.int64(2 * _UNIT)
            lane = (n_before + row * n_columns + column) % N_LANES
            state = np.uint64(states[lane])
            for start in range((n_raw - 1) // _UNIT * _UNIT, -1, -_UNIT):
                n_bits = np.uint64(min(n_raw - start, _UNIT))
                if state >> (np.uint64(2 * _UNIT) - n_bits):
                    position -= 1
                    bitstream[position] = state & np.uint64((1 << _UNIT) - 1)
                    state >>= np.uint64(_UNIT)
                state = state << n_bits | (np.uint64(raw >> start) & ((np.uint64(1) << n_bits) - np.uint64(1)))
            entry = np.int64(symbols[table * MAX_SYMBOLS + symbol])
            frequency, first = np.uint64(entry >> 16 & 0xFFFF), np.uint64(entry & 0xFFFF)
            if state >= frequency << np.uint64(2 * _UNIT - PRECISION):
                position -= 1
                bitstream[position] = state & np.uint64((1 << _UNIT) - 1)
                state >>= np.uint64(_UNIT)
            quotient = state // frequency
            states[lane] = (quotient << np.uint64(PRECISION)) + state - quotient * frequency + first
    return position


@compiled
def _pop(
    row_levels: NDArray[np.int64],
    column_levels: NDArray[np.int64],
    buckets: NDArray[np.uint16],
    symbols: NDArray[np.uint64],
    states: NDArray[np.uint32],
    n_before: int,
    bitstream: NDArray[np.uint16],
    position: int,
    end: int,
    following: NDArray[np.uint8],
    column_states: NDArray[np.uint8],
    integers: NDArray[np.int32],
    floats: NDArray[np.float32],
    row_scales: NDArray[np.float32],
    column_scales: NDArray[np.float32],
) -> int:
    """Take rows of integers from the states, in place; see `Decoder.decode`. Return the position of the next value.

    `n_before` is the number of integers that were decoded before. `following` has the next state of the trellis for
    each state and parity. The function stops after a row in which it reads beyond `end`. All indices are unsigned,
    because Numba makes slower code for signed ones.
    """
    n_columns, one, unit, mask = len(column_levels), np.uint64(1), np.uint64(_UNIT), np.uint64((1 << _UNIT) - 1)
    lane, next_unit = np.uint64(n_before % N_LANES), np.uint64(position)
    steps_per_symbol = 2 if len(following) > 2 else 1
    table_of, n_raw_of = np.empty(n_columns, np.uint64), np.empty(n_columns, np.int64)
    for row in range(len(row_levels)):
        if row == 0 or row_levels[row] != row_levels[row - 1]:
            for column in range(n_columns):
                level = min(max(row_levels[row] + column_levels[column], _MIN_LEVEL), _MAX_LEVEL)
                n_raw_of[column] = max(0, -((_TOP_LEVEL - level) // LEVELS_PER_OCTAVE))
                table_of[column] = 2 * (level - LEVELS_PER_OCTAVE * n_raw_of[column] - _MIN_LEVEL)
        values = integers[row % len(integers)]
        for column in range(n_columns):
            column_state, state = np.uint64(column_states[column]), np.uint64(states[lane])
            table, slot = table_of[column] + (column_state & one), state & np.uint64((1 << PRECISION) - 1)
            bucket = (table << np.uint64(PRECISION - BUCKET_BITS)) + (slot >> np.uint64(BUCKET_BITS))
            place = table * np.uint64(MAX_SYMBOLS) + np.uint64(buckets[bucket])
            entry = symbols[place]
            while slot - (entry & mask) >= (entry >> unit & mask):
                place += one
                entry = symbols[place]
            state = (state >> np.uint64(PRECISION)) * (entry >> unit & mask) + slot - (entry & mask)
            is_low, refilled = state <= mask, state << unit | np.uint64(bitstream[next_unit])
            state = refilled if is_low else state
            next_unit += np.uint64(is_low)
            symbol, n_raw = np.int64(entry) >> 2 * _UNIT, n_raw_of[column]
            if n_raw or symbol == ESCAPE:
                raw, n_raw = np.int64(0), n_raw if symbol != ESCAPE else 2 * _UNIT
                for start in range(0, n_raw, _UNIT):
                    n_bits = np.uint64(min(n_raw - start, _UNIT))
                    raw |= np.int64(state & ((one << n_bits) - one)) << start
                    state >>= n_bits
                    is_low, refilled = state <= mask, state << unit | np.uint64(bitstream[next_unit])
                    state = refilled if is_low else state
                    next_unit += np.uint64(is_low)
                symbol = np.int64(np.int32(raw)) if symbol == ESCAPE else symbol << n_raw | raw
            states[lane] = state
            lane = (lane + one) % np.uint64(N_LANES)
            values[column] = steps_per_symbol * symbol + np.int64(column_state & one)
            column_states[column] = following[column_state + column_state + np.uint64(symbol & 1)]
        if len(floats):
            for column in range(n_columns):
                floats[row, column] = np.float32(values[column]) * column_scales[column] * row_scales[row]
        if next_unit > np.uint64(end):
            break
    return int(next_unit)
