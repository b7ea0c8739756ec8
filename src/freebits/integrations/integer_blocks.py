"""Matrices of 8-bit or 4-bit integers in memory, and compiled loops that multiply by them.

The codes of quantized models have integers of any size. Nearly all fit 8 bits and, at about 3 bits per weight or less,
4 bits. An integer that does not fit is an *outlier*: it is clipped, and what was cut off is stored separately, as a
float.

With a trellis (see `freebits.codecs.trellis`), an integer is `2 k + s`, and `s` is the parity of the state of its
column. Of such integers, 4 bits hold only `k`. The states are stored for every `GROUP`-th row, and computed for the
others.
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from freebits.codecs.integers import FINENESS, IntegerChunk, scales_of
from freebits.codecs.trellis import POLYNOMIALS
from freebits.compiled import compiled

GROUP = 128
"""Number of rows of a group. `IntegerBlock.add` expects chunks of this many rows."""
_MAX_INTEGER = 127
_MAX_NIBBLE = 7
_MAX_OUTLIERS = 1 / 64
"""Largest number of stored outliers, as a fraction of a block's integers. An integer that was clipped to 8 bits and
then to 4 bits counts twice."""
_EXPANDED_AT_ONCE = 1 << 20
"""Number of integers that are expanded to floats at a time; they fit the cache of the processor."""
_BYTES_PER_WORD = 8
_EVERY_BYTE = 0x0101010101010101
"""A word of 64 bits in which every byte is 1. The compiled loops work on 8 bytes at once."""
_ROWS_AT_ONCE = 4
"""Number of rows that are multiplied at once; it divides `GROUP`."""


class IntegerBlock(nn.Module):
    """Consecutive rows of a matrix, (n, m): integers, and a scale for each row and each column.

    First call `add` for each chunk of rows in order, then `finish`.

    Args:
        n: number of rows.
        m: number of columns.
    """

    integers: Tensor
    nibbles: Tensor
    states: Tensor
    rows: Tensor
    columns: Tensor
    outlier_starts: Tensor
    outlier_columns: Tensor
    outlier_values: Tensor

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.shape = n, m
        self.n_states = 0
        self._outliers: list[tuple[Tensor, Tensor]] = []
        self._states: list[NDArray[np.uint8]] = []
        # 8-bit integers, (n, m), or (0, m) if the 4-bit integers are used
        self.register_buffer("integers", torch.empty(0, m, dtype=torch.int8))
        # Each word has 8 columns in its lower nibbles, and 8 columns of the right half of the row in its upper nibbles.
        self.register_buffer("nibbles", torch.empty(0, 0, dtype=torch.int64))
        self.register_buffer("states", torch.empty(0, 0, dtype=torch.int64))  # (groups, 2 * words per row)
        self.register_buffer("rows", torch.empty(0))
        self.register_buffer("columns", torch.empty(0))
        # The outliers of row r are those from `outlier_starts[r]` to `outlier_starts[r + 1]`.
        self.register_buffer("outlier_starts", torch.zeros(n + 1, dtype=torch.int32))
        self.register_buffer("outlier_columns", torch.empty(0, dtype=torch.int32))
        self.register_buffer("outlier_values", torch.empty(0))

    def add(self, chunk: IntegerChunk) -> None:
        """Add the next rows."""
        if chunk.start == 0:
            self.n_states, self.integers = chunk.n_states, torch.empty(self.shape, dtype=torch.int8)
            # A power of 2 is moved from the columns to the rows, so that inputs times column scales fit 16-bit floats.
            power = FINENESS * round(chunk.columns.float().median().item() / FINENESS) if len(chunk.columns) else 0
            self.rows, self.columns = scales_of(chunk.rows + power), scales_of(chunk.columns - power)
        self._states.append(chunk.states)
        clipped, places, excess = _clipped(torch.from_numpy(chunk.integers), 4, _MAX_INTEGER)
        self.integers[chunk.start : chunk.start + len(clipped)] = clipped
        self._add_outliers(chunk.start, places, excess)

    def finish(self) -> None:
        """Store the integers in 4 bits if at most `_MAX_OUTLIERS` of them are outliers then."""
        step, nibbles, outliers = (2 if self.n_states else 1), [], self._outliers
        for start, _, rows in self._integer_rows() if self.integers.numel() else ():
            clipped, places, excess = _clipped(rows.div(step, rounding_mode="floor"), 2, _MAX_NIBBLE)
            self._add_outliers(start, places, step * excess)
            nibbles.append(_nibble_words(clipped))
            if not self.fits:
                self._outliers = outliers
                break
        else:
            if nibbles:
                self.nibbles, self.integers = torch.cat(nibbles), torch.empty(0, self.shape[1], dtype=torch.int8)
                self.states = torch.stack([_words(states, 2 * self.nibbles.shape[1]) for states in self._states])
        places, excess = (torch.cat(tensors) for tensors in zip(*self._outliers, strict=True))
        order = places[:, 0].argsort(stable=True)
        self.outlier_starts[1:] = torch.bincount(places[:, 0], minlength=self.shape[0]).cumsum(0)
        self.outlier_columns, self.outlier_values = places[order, 1], excess[order]
        self._states, self._outliers = [], []

    def _add_outliers(self, start: int, places: Tensor, excess: Tensor) -> None:
        """Add outliers of the rows from `start`: their places, (outliers, 2), and by how much they are too small."""
        self._outliers = [*self._outliers, ((places + torch.tensor([start, 0])).int(), excess.float())]

    @property
    def fits(self) -> bool:
        """Whether there are at most `_MAX_OUTLIERS` outliers, until now or, after `finish`, in the end."""
        n_outliers = len(self.outlier_values) + sum(len(excess) for _, excess in self._outliers)
        return n_outliers <= _MAX_OUTLIERS * self.shape[0] * self.shape[1]

    def release(self) -> None:
        """Release the memory of the integers and scales."""
        for name, tensor in self.named_buffers():
            setattr(self, name, tensor.new_empty(0))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "IntegerBlock":
        """Move the block. Devices other than the CPU get 8-bit integers."""
        if self.nibbles.numel() and fn(self.rows).device.type != "cpu":
            self.integers = torch.cat([rows for _, _, rows in self._integer_rows()])
            self.nibbles = self.states = self.nibbles.new_empty(0, 0)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def values(self, dtype: torch.dtype = torch.float32) -> Iterator[tuple[int, int, Tensor]]:
        """Yield all integers with their outliers, as floats, some rows at a time.

        Each item consists of the first row, the row after the last, and the values. Scales are not applied.
        """
        for start, stop, rows in self._integer_rows():
            yield start, stop, self._with_outliers(rows.to(dtype), torch.arange(start, stop, device=rows.device))

    def lookup(self, indices: Tensor) -> Tensor:
        """Return rows of the block, (k, m), float32, with their scales, given their indices, (k,)."""
        if self.nibbles.numel():
            indices = indices.long()
            words = np.empty((len(indices), 2 * self.nibbles.shape[1]), np.uint64)
            _unpack_rows(*self._arrays(), indices.numpy(), *self._masks(), words)
            rows = torch.from_numpy(words.view(np.int8))[:, : self.shape[1]]
        else:
            rows = self.integers[indices]
        return self._with_outliers(rows.float(), indices) * self.columns * self.rows[indices, None]

    def multiply(self, x: NDArray[np.float32], out: NDArray[np.float32], start: int, stop: int) -> None:
        """Fill columns `start` to `stop` of `out`, (k, n), with those of `x Vᵀ`; `V` has the integers with outliers.

        If the integers have 4 bits, `start` must be a multiple of `GROUP`.

        Args:
            x: inputs, (k, m), with the column scales applied.
            out: array to fill; the row scales are not applied.
            start: index of the first row.
            stop: index of the row after the last row.
        """
        words = np.empty((_ROWS_AT_ONCE, 2 * self.nibbles.shape[1]), np.uint64)
        outliers = (self.outlier_starts.numpy(), self.outlier_columns.numpy(), self.outlier_values.numpy())
        integers = self.integers.numpy()
        _multiply(integers, *self._arrays(), *self._masks(), words, words.view(np.int8), *outliers, x, out, start, stop)

    def _integer_rows(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield first row, row after the last, and clipped integers (int8) of some rows at a time."""
        n, m = self.shape
        step = GROUP * max(1, _EXPANDED_AT_ONCE // (GROUP * max(1, m)))
        for start in range(0, n, step):
            stop = min(n, start + step)
            yield start, stop, self._unpacked(start, stop) if self.nibbles.numel() else self.integers[start:stop]

    def _unpacked(self, start: int, stop: int) -> Tensor:
        """Return the 8-bit integers of rows whose integers have 4 bits; `start` is a multiple of `GROUP`."""
        nibbles, states = self._arrays()
        words = np.empty((stop - start, states.shape[1]), np.uint64)
        for first in range(start, stop, GROUP):
            group = slice(first, min(stop, first + GROUP))
            _unpack(nibbles[group], states[first // GROUP].copy(), *self._masks(), words[first - start :])
        return torch.from_numpy(words.view(np.int8))[:, : self.shape[1]]

    def _with_outliers(self, values: Tensor, indices: Tensor) -> Tensor:
        """Add the outliers of the rows with these indices, (k,), to the values of these rows, (k, m), in place."""
        starts = self.outlier_starts[indices].long()
        counts = self.outlier_starts[indices + 1].long() - starts
        if len(self.outlier_values) and counts.any():
            ends, device = counts.cumsum(0), values.device
            places = (starts - ends + counts).repeat_interleave(counts) + torch.arange(int(ends[-1]), device=device)
            rows = torch.arange(len(indices), device=device).repeat_interleave(counts)
            columns = self.outlier_columns[places].long()
            values.index_put_((rows, columns), self.outlier_values[places].to(values.dtype), accumulate=True)
        return values

    def _arrays(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """Return the nibbles and the states in the form for compiled loops."""
        return self.nibbles.numpy().view(np.uint64), self.states.numpy().view(np.uint64)

    def _masks(self) -> tuple[np.uint64, np.uint64, np.uint64]:
        """Return masks in the form for compiled loops: two for the next state, and one that doubles `k`; see `_unpack`.

        The next state is half the state, XOR the first mask if the state is odd, XOR the second mask if `k` is odd.
        """
        polynomials = POLYNOMIALS[self.n_states] if self.n_states else (0, 0)
        masks = (*(polynomial >> 1 for polynomial in polynomials), 255 if self.n_states else 0)
        first, second, doubled = (np.uint64(mask * _EVERY_BYTE) for mask in masks)
        return first, second, doubled


def _clipped(integers: Tensor, modulus: int, largest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clip integers, (n, m), to `-largest - 1` to `largest` so that their remainders modulo `modulus` do not change.

    Returns:
        The clipped integers, int8; the places of those that were changed, (outliers, 2); and by how much each of these
        is too small.
    """
    clipped = integers.clamp(-largest - 1, largest)
    places = (clipped != integers).nonzero()
    large = integers[*places.T]
    remainders = large.remainder(modulus)
    nearest = torch.where(large > 0, remainders + (largest + 1 - modulus), remainders - (largest + 1))
    clipped[*places.T] = nearest
    return clipped.to(torch.int8), places, large - nearest


def _nibble_words(integers: Tensor) -> Tensor:
    """Store integers from -8 to 7, (n, m), in 4 bits: words of 64 bits, (n, words), int64."""
    n, m = integers.shape
    width = _BYTES_PER_WORD * -(-m // (2 * _BYTES_PER_WORD))
    nibbles = torch.zeros(n, 2 * width, dtype=torch.uint8)
    nibbles[:, :m] = integers + (_MAX_NIBBLE + 1)
    return (nibbles[:, :width] | nibbles[:, width:] << 4).view(torch.int64)


def _words(data: NDArray[np.uint8], n_words: int) -> Tensor:
    """Store bytes in words of 64 bits, (n_words,), int64, with zeros at the end."""
    words = np.zeros(_BYTES_PER_WORD * n_words, np.uint8)
    words[: len(data)] = data
    return torch.from_numpy(words.view(np.int64))


@compiled
def _unpack(
    nibbles: NDArray[np.uint64],
    states: NDArray[np.uint64],
    odd_state: np.uint64,
    odd_symbol: np.uint64,
    doubled: np.uint64,
    words: NDArray[np.uint64],
) -> None:
    """Fill `words`, (rows, 2 w), with the 8-bit integers of rows of nibbles, (n, w). Row `r` goes to row `r % rows`.

    Each operation works on 8 columns at once, one byte for each. `states`, (2 w), are updated in place. The masks are
    those of `IntegerBlock._masks`.
    """
    ones, eights = np.uint64(_EVERY_BYTE), np.uint64(8 * _EVERY_BYTE)
    fifteens, sign_bits = np.uint64(15 * _EVERY_BYTE), np.uint64(128 * _EVERY_BYTE)
    one, byte = np.uint64(1), np.uint64(8)
    width = nibbles.shape[1]
    offset = eights + (eights & doubled)
    for half in range(2):
        columns = slice(half * width, (half + 1) * width)
        column_states, shift = states[columns], np.uint64(4 * half)
        for row in range(len(nibbles)):
            symbols, integers = nibbles[row], words[row % len(words), columns]
            for i in range(width):
                symbol, state = symbols[i] >> shift & fifteens, column_states[i]
                odd, state_odd = symbol & ones, state & ones
                # the sign bit keeps the subtraction from borrowing from the next byte
                integers[i] = ((symbol + (symbol & doubled) + state_odd | sign_bits) - offset) ^ sign_bits
                column_states[i] = (
                    state >> one & ~sign_bits
                    ^ ((state_odd << byte) - state_odd & odd_state)
                    ^ ((odd << byte) - odd & odd_symbol)
                )


@compiled
def _unpack_rows(
    nibbles: NDArray[np.uint64],
    states: NDArray[np.uint64],
    indices: NDArray[np.int64],
    odd_state: np.uint64,
    odd_symbol: np.uint64,
    doubled: np.uint64,
    words: NDArray[np.uint64],
) -> None:
    """Fill `words`, (k, 2 w), with the 8-bit integers of the rows with these indices, (k,)."""
    for i in range(len(indices)):
        group, last = indices[i] // GROUP, indices[i]
        rows = nibbles[group * GROUP : last + 1]
        _unpack(rows, states[group].copy(), odd_state, odd_symbol, doubled, words[i : i + 1])


@partial(compiled, any_order=True)
def _multiply_rows(rows: NDArray[np.int8], x: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Fill `out`, (k, n), with `x rowsᵀ` for at most `_ROWS_AT_ONCE` rows, (n, at least m), and inputs `x`, (k, m).

    Each inner loop computes four sums at once: for four inputs and one row of weights, so that each weight is converted
    only once for them, or for one of the remaining inputs and four rows.
    """
    n_inputs, n_columns = x.shape
    n_fours = n_inputs // 4 * 4
    for i in range(0, n_fours, 4):
        x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
        for row in range(len(rows)):
            weights = rows[row]
            total0 = total1 = total2 = total3 = np.float32(0)
            for column in range(n_columns):
                weight = np.float32(weights[column])
                total0 += weight * x0[column]
                total1 += weight * x1[column]
                total2 += weight * x2[column]
                total3 += weight * x3[column]
            out[i, row], out[i + 1, row], out[i + 2, row], out[i + 3, row] = total0, total1, total2, total3
    last = len(rows) - 1
    w0, w1, w2, w3 = rows[0], rows[min(1, last)], rows[min(2, last)], rows[last]
    for i in range(n_fours, n_inputs):
        inputs = x[i]
        total0 = total1 = total2 = total3 = np.float32(0)
        for column in range(n_columns):
            value = inputs[column]
            total0 += np.float32(w0[column]) * value
            total1 += np.float32(w1[column]) * value
            total2 += np.float32(w2[column]) * value
            total3 += np.float32(w3[column]) * value
        totals = (total0, total1, total2, total3)
        for row in range(len(rows)):
            out[i, row] = totals[row]


@compiled
def _multiply(
    integers: NDArray[np.int8],
    nibbles: NDArray[np.uint64],
    states: NDArray[np.uint64],
    odd_state: np.uint64,
    odd_symbol: np.uint64,
    doubled: np.uint64,
    words: NDArray[np.uint64],
    unpacked: NDArray[np.int8],
    outlier_starts: NDArray[np.int32],
    outlier_columns: NDArray[np.int32],
    outlier_values: NDArray[np.float32],
    x: NDArray[np.float32],
    out: NDArray[np.float32],
    start: int,
    stop: int,
) -> None:
    """Multiply as `IntegerBlock.multiply`. `unpacked` has the memory of `words`, in which 4-bit rows are unpacked."""
    group_states = np.empty(states.shape[1], np.uint64)
    for first in range(start, stop, _ROWS_AT_ONCE):
        end = min(first + _ROWS_AT_ONCE, stop)
        rows = integers[first:end]
        if len(nibbles):
            if first % GROUP == 0:
                group_states[:] = states[first // GROUP]
            _unpack(nibbles[first:end], group_states, odd_state, odd_symbol, doubled, words)
            rows = unpacked[: end - first]
        _multiply_rows(rows, x, out[:, first:end])
        for row in range(first, end):
            for index in range(outlier_starts[row], outlier_starts[row + 1]):
                for i in range(len(x)):
                    out[i, row] += outlier_values[index] * x[i, outlier_columns[index]]
