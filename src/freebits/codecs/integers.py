"""Entropy-coded matrices of integers with a scale for each row and each column."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from freebits.codecs import ans
from freebits.codecs.base import Coded, Params
from freebits.codecs.bits import as_tensor, bytes_from, bytes_spec, pack_bits, unpack_bits, zstd
from freebits.codecs.trellis import POLYNOMIALS, half_steps
from freebits.types import FLOATS, TensorSpec

MESSAGE = "message"
FINENESS = 16
"""Scales are `2^(e / FINENESS)` for integer exponents `e`."""
_MAX_EXPONENT = 128 * FINENESS - 1
"""The largest exponent whose scale fits float32."""
_ROOT = sqrt(sqrt(sqrt(sqrt(2.0))))  # IEEE 754 rounds roots and products in the same way everywhere
_POWERS = np.array([np.prod([1.0] + [_ROOT] * power) for power in range(FINENESS)])
_HEADER_SIZE = 4 * 2
_ZSTD_LEVEL = 19
_DECODED_AT_ONCE = 1 << 17
"""Number of integers that are converted to floats at a time; they fit the cache of the processor."""
_PACKED_AT_ONCE = 1 << 20
"""Number of integers whose lower bits are packed at a time; a multiple of 8, so that the bits fill complete bytes."""
_MAX_LEVEL = ans.LEVELS[-1] + 18 * ans.LEVELS_PER_OCTAVE
"""The level of integers whose standard deviation is `2^24`."""
_MIN_VARIANCE = 1e-3
_TRELLIS = "trellis"
_MEAN_SYMBOL = -0.25
"""Mean of the symbols of a trellis: half of the values are `k + 1/2`, and the mean of all values is 0."""


@dataclass(frozen=True)
class ScaledIntegers:
    """A matrix `integers * 2^(rows / 16) * 2^(columns / 16)`.

    Attributes:
        integers: (n, m), int32.
        rows: (n,), int16, exponents of the row scales.
        columns: (m,), int16, exponents of the column scales.
    """

    integers: Tensor
    rows: Tensor
    columns: Tensor

    def floats(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix, (n, m), computed in float32 and then rounded to `dtype`."""
        return (self.integers.float() * steps(self.columns) * steps(self.rows)[:, None]).to(dtype)


def steps(exponents: Tensor) -> Tensor:
    """Return the scales `2^(e / 16)` in float32, the same on all machines."""
    octaves, remainders = np.divmod(exponents.numpy().astype(np.int32), FINENESS)
    return torch.from_numpy(np.ldexp(_POWERS[remainders], octaves).astype(np.float32))


def exponents(scales: Tensor) -> Tensor:
    """Round positive scales to the nearest exponents, int16; the inverse of `steps`."""
    return (scales.double().log2() * FINENESS).round().to(torch.int16)


class Integers:
    """Matrices, encoded together. Each consists of integers and the exponents of its row scales and column scales.

    Each row and each column has a *level* in quarters of an octave. Row level plus column level estimates how large an
    integer is, and selects the table of `freebits.codecs.ans` for the integer. Integers too large for any table are
    split: only their upper bits are entropy-coded, because their lower bits are almost random.

    Layout of part `message`, little-endian: size of the side data in bytes, number of escaped integers (u32 each); side
    data (zstd); escaped integers (i32); lower bits; bitstream (u16). The side data has for each matrix the row
    exponents and column exponents (i16), then the row levels and column levels (i8).

    With a trellis, the integers are values in half steps, and the message has their symbols; see
    `freebits.codecs.trellis`. The number of states is the parameter `trellis`.

    Args:
        n_states: number of states of the trellis with which `encode` encodes; 0 for no trellis.
    """

    exact = False

    def __init__(self, n_states: int = 0) -> None:
        self._n_states = n_states

    def encode(self, tensors: Sequence[Tensor], makes: Sequence[TensorSpec]) -> Coded:  # noqa: ARG002
        """Encode matrices. `tensors` has the three tensors of a `ScaledIntegers` for each matrix."""
        matrices = [ScaledIntegers(*tensors[start : start + 3]) for start in range(0, len(tensors), 3)]
        if self._n_states:
            matrices = [ScaledIntegers(matrix.integers >> 1, matrix.rows, matrix.columns) for matrix in matrices]
        levels = [_levels(matrix.integers) for matrix in matrices]
        ordered = [
            matrix.integers.numpy()[np.ix_(*map(_order, row_and_column_levels))]
            for matrix, row_and_column_levels in zip(matrices, levels, strict=True)
        ]
        blocks: dict[int, list[NDArray[np.int32]]] = {}
        for level, index, rows, columns in _blocks(levels):
            blocks.setdefault(level, []).append(ordered[index][rows, columns].reshape(-1))
        upper, lower = [], []
        for level, level_blocks in blocks.items():
            integers, n_lower = np.concatenate(level_blocks), _n_lower(level)
            upper.append((level - ans.LEVELS_PER_OCTAVE * n_lower, integers >> n_lower))
            lower.append(_pack_lower(integers, n_lower))
        bitstream, escaped = ans.encode(upper, _MEAN_SYMBOL if self._n_states else 0.0)
        side_data = b"".join(
            values.tobytes()
            for matrix, row_and_column_levels in zip(matrices, levels, strict=True)
            for values in (*(e.numpy().astype("<i2") for e in (matrix.rows, matrix.columns)), *row_and_column_levels)
        )
        side_data = zstd.compress(side_data, _ZSTD_LEVEL)
        header = np.array([len(side_data), len(escaped)], "<u4").tobytes()
        escaped_bytes, bitstream_bytes = escaped.astype("<i4").tobytes(), bitstream.astype("<u2").tobytes()
        message = b"".join([header, side_data, escaped_bytes, *lower, bitstream_bytes])
        trellis = {_TRELLIS: self._n_states} if self._n_states else {}
        return Coded({MESSAGE: as_tensor(message)}, {"bytes": len(message), **trellis})

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params) -> list[Tensor]:
        """Return the matrices as floats."""
        decoded = []
        for spec, (ordered, rows, columns, row_exponents, column_exponents) in zip(
            makes, _read(parts, makes, params), strict=True
        ):
            matrix = torch.empty(spec.shape, dtype=spec.dtype)
            column_scales, row_scales = steps(column_exponents), steps(row_exponents)[:, None]
            n_states, states = params.get(_TRELLIS, 0), np.zeros(len(columns), np.uint8)
            n_rows = max(1, _DECODED_AT_ONCE // max(1, spec.shape[1]))
            for start in range(0, spec.shape[0], n_rows):
                chunk = slice(start, start + n_rows)
                integers = ordered.index_select(0, rows[chunk]).index_select(1, columns)
                if n_states:
                    integers = torch.from_numpy(half_steps(integers.int().numpy(), n_states, states))
                matrix[chunk] = integers.float().mul_(column_scales).mul_(row_scales[chunk])
            decoded.append(matrix)
        return decoded

    def parts(self, makes: Sequence[TensorSpec], params: Params) -> dict[str, TensorSpec]:
        """Return the spec of the message, which has `params["bytes"]` bytes."""
        for spec in makes:
            if spec.dtype_name not in FLOATS or len(spec.shape) != 2:
                raise ValueError(f"code integers cannot make {spec}: the code makes only matrices of floats")
        n_states = params.get(_TRELLIS, 0)
        if type(n_states) is not int or n_states not in (0, *POLYNOMIALS):
            raise ValueError(f"there is no trellis with {n_states!r} states")
        return {MESSAGE: bytes_spec(params["bytes"])}

    def scaled_integers(
        self, parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params
    ) -> Iterator[ScaledIntegers]:
        """Yield the matrices as integers and exponents.

        Raises:
            ValueError: the message is damaged.
        """
        for ordered, rows, columns, row_exponents, column_exponents in _read(parts, makes, params):
            integers = ordered[rows][:, columns].int()
            if n_states := params.get(_TRELLIS, 0):
                states = np.zeros(len(columns), np.uint8)
                integers = torch.from_numpy(half_steps(integers.numpy(), n_states, states))
            yield ScaledIntegers(integers, row_exponents, column_exponents)


def _read(
    parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Decode the message, and yield five tensors for each matrix.

    The tensors are the integers with rows and columns sorted by level, the positions of the rows and of the columns
    among the sorted ones, and the exponents of the rows and of the columns.
    """
    message = bytes_from(parts[MESSAGE], params["bytes"])
    if len(message) < _HEADER_SIZE:
        raise ValueError("the message is cut off")
    n_side, n_escaped = (int(n) for n in message[:_HEADER_SIZE].view("<u4"))
    side_end = _HEADER_SIZE + n_side
    escaped_end = side_end + 4 * n_escaped
    if escaped_end > len(message):
        raise ValueError("the message is cut off")
    escaped = np.frombuffer(message[side_end:escaped_end].tobytes(), "<i4").astype(np.int32)
    shapes = [spec.shape for spec in makes]
    side_data = list(_side_data(message[_HEADER_SIZE:side_end].tobytes(), shapes))
    blocks = _blocks([levels for _, _, *levels in side_data])
    lengths: dict[int, int] = {}
    for level, _, rows, columns in blocks:
        lengths[level] = lengths.get(level, 0) + (rows.stop - rows.start) * (columns.stop - columns.start)
    ends = np.cumsum([0, *(-(-n * _n_lower(level) // 8) for level, n in lengths.items())]) + escaped_end
    lower = {level: message[start:end].tobytes() for level, start, end in zip(lengths, ends, ends[1:], strict=False)}
    bitstream = message[int(ends[-1]) :].tobytes()
    if ends[-1] > len(message) or len(bitstream) % 2:
        raise ValueError("the message is cut off")
    segments = [(level - ans.LEVELS_PER_OCTAVE * _n_lower(level), n) for level, n in lengths.items()]
    small = not ends[-1] > ends[0] and (not len(escaped) or -(2**15) <= escaped.min() <= escaped.max() < 2**15)
    matrices = [np.empty(shape, np.int16 if small else np.int32) for shape in shapes]
    mean = _MEAN_SYMBOL if params.get(_TRELLIS, 0) else 0.0
    decoded = ans.decode(np.frombuffer(bitstream, "<u2"), segments, escaped, mean)
    start, segment_level = 0, None
    for level, index, rows, columns in blocks:
        if level != segment_level:
            segment, segment_level, start = _join(next(decoded), lower[level], _n_lower(level)), level, 0
        block = matrices[index][rows, columns]
        block[:] = segment[start : start + block.size].reshape(block.shape)
        start += block.size
    for _ in decoded:  # exhaust the decoder, because it checks the escaped integers at its end
        pass
    for ordered, (row_exponents, column_exponents, *levels) in zip(matrices, side_data, strict=True):
        row_positions, column_positions = (torch.from_numpy(np.argsort(_order(axis_levels))) for axis_levels in levels)
        both_exponents = torch.from_numpy(row_exponents), torch.from_numpy(column_exponents)
        yield torch.from_numpy(ordered), row_positions, column_positions, *both_exponents


def _levels(integers: Tensor) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Return the levels of the rows and of the columns. The level of an integer is row level plus column level."""
    squares = integers.double().square_()
    columns = squares.mean(0).clamp_min_(_MIN_VARIANCE)
    rows = (squares / columns).mean(1).clamp_min_(_MIN_VARIANCE)
    columns = (squares / rows[:, None]).mean(0)
    typical = rows.log().mean().exp()
    # 1/12 is the variance of rounding errors
    variances = (rows / typical, (columns * typical - 1 / 12).clamp_min_(_MIN_VARIANCE))
    levels = [(variance.log2() * ans.LEVELS_PER_OCTAVE / 2).round().clamp(-64, 63) for variance in variances]
    return levels[0].numpy().astype(np.int8), levels[1].numpy().astype(np.int8)


def _n_lower(level: int) -> int:
    """Return the number of lower bits to split off integers of a level, so that the last table fits the upper bits."""
    return max(0, -(-(level - ans.LEVELS[-1]) // ans.LEVELS_PER_OCTAVE))


def _pack_lower(integers: NDArray[np.int32], n_bits: int) -> bytes:
    """Pack the lower bits of the integers."""
    if not n_bits:
        return b""
    starts = range(0, len(integers), _PACKED_AT_ONCE)
    chunks = [integers[start : start + _PACKED_AT_ONCE].astype(np.int64) for start in starts]
    return b"".join(pack_bits(chunk & (1 << n_bits) - 1, n_bits) for chunk in chunks)


def _join(upper: ans.Decoded, lower: bytes, n_bits: int) -> ans.Decoded:
    """Join upper bits and packed lower bits into integers."""
    if not n_bits:
        return upper
    integers = upper.astype(np.int32) << n_bits
    for start in range(0, len(integers), _PACKED_AT_ONCE):
        chunk = integers[start : start + _PACKED_AT_ONCE]
        chunk |= unpack_bits(lower[start * n_bits // 8 :], len(chunk), n_bits).astype(np.int32)
    return integers


def _order(levels: NDArray[np.int8]) -> NDArray[np.int64]:
    """Return the indices that sort rows or columns by level."""
    return np.argsort(levels, kind="stable")


def _blocks(levels: Sequence[Sequence[NDArray[np.int8]]]) -> list[tuple[int, int, slice, slice]]:
    """Return the blocks of the ordered matrices, sorted by level. All integers of a block have the same level.

    A block is a tuple of level, index of the matrix, rows and columns.
    """
    blocks = []
    for index, row_and_column_levels in enumerate(levels):
        rows, columns = (_runs(axis_levels) for axis_levels in row_and_column_levels)
        for row_level, row_slice in rows:
            for column_level, column_slice in columns:
                level = min(max(row_level + column_level, ans.LEVELS[0]), _MAX_LEVEL)
                blocks.append((level, index, row_slice, column_slice))
    return sorted(blocks, key=lambda block: block[:2])


def _runs(levels: NDArray[np.int8]) -> list[tuple[int, slice]]:
    """Return the distinct levels in ascending order, each with its slice of the sorted levels."""
    values, counts = np.unique(levels, return_counts=True)
    ends = np.cumsum(counts)
    return [(int(v), slice(int(end - n), int(end))) for v, n, end in zip(values, counts, ends, strict=True)]


def _side_data(data: bytes, shapes: Sequence[tuple[int, ...]]) -> Iterator[tuple[NDArray[Any], ...]]:
    """Yield the row exponents, column exponents, row levels and column levels of each matrix."""
    n_bytes = sum(3 * (rows + columns) for rows, columns in shapes)
    decoder = zstd.ZstdDecompressor()
    try:
        content = decoder.decompress(data, max_length=n_bytes)
    except zstd.ZstdError as error:
        raise ValueError(str(error)) from None
    if len(content) != n_bytes or not decoder.eof or decoder.unused_data:
        raise ValueError(f"the side data does not have exactly the {n_bytes} bytes that the matrices need")
    offset = 0
    for rows, columns in shapes:
        arrays = []
        for size, dtype in ((rows, "<i2"), (columns, "<i2"), (rows, "<i1"), (columns, "<i1")):
            arrays.append(np.frombuffer(content, dtype, size, offset).astype(dtype[1:]))
            offset += arrays[-1].nbytes
        if max(arrays[0].max(initial=0), arrays[1].max(initial=0)) > _MAX_EXPONENT:
            raise ValueError(f"an exponent is above {_MAX_EXPONENT}: its scale does not fit float32")
        yield tuple(arrays)
