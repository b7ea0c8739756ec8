"""Entropy-coded matrices of integers with a scale for each row and each column."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from freebits.codecs import integer_stream
from freebits.codecs.base import Check, Coded, Params
from freebits.codecs.bits import as_tensor, bytes_from, bytes_spec, decompressed, zstd
from freebits.codecs.normal_tables import LEVELS_PER_OCTAVE
from freebits.codecs.trellis import POLYNOMIALS
from freebits.types import FLOATS, TensorSpec

MESSAGE = "message"
FINENESS = 16
"""Scales are `2^(e / FINENESS)` for integer exponents `e`."""
_MAX_EXPONENT = 128 * FINENESS - 1
"""The largest exponent whose scale fits float32."""
_ROOT = sqrt(sqrt(sqrt(sqrt(2.0))))  # IEEE 754 rounds roots and products in the same way everywhere
_POWERS = np.array([np.prod([1.0] + [_ROOT] * power) for power in range(FINENESS)])
_HEADER_SIZE = 4
_ZSTD_LEVEL = 19
_DECODED_AT_ONCE = 1 << 17
"""Number of integers that are converted to floats at a time; they fit the cache of the processor."""
_MIN_VARIANCE = 1e-3
_TRELLIS = "trellis"


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
        return (self.integers.float() * scales_of(self.columns) * scales_of(self.rows)[:, None]).to(dtype)


@dataclass(frozen=True)
class IntegerChunk:
    """Consecutive rows of one of several matrices of integers.

    Attributes:
        index: index of the matrix.
        start: index of the chunk's first row in the matrix.
        rows: exponents of the scales of all rows of the matrix, (n,), int16.
        columns: exponents of the scales of all columns, (m,), int16.
        n_states: number of states of the trellis; 0 for no trellis.
        states: state of the trellis in each column before the first row, (m,), uint8.
        integers: (rows of the chunk, m), int32. The next chunk of the matrix replaces them.
    """

    index: int
    start: int
    rows: Tensor
    columns: Tensor
    n_states: int
    states: NDArray[np.uint8]
    integers: NDArray[np.int32]


def scales_of(exponents: Tensor) -> Tensor:
    """Return the scales `2^(e / 16)` of exponents `e`, in float32, the same on all machines."""
    octaves, remainders = np.divmod(exponents.numpy().astype(np.int32), FINENESS)
    return torch.from_numpy(np.ldexp(_POWERS[remainders], octaves).astype(np.float32))


def exponents(scales: Tensor) -> Tensor:
    """Round positive scales to the nearest exponents, int16; the inverse of `scales_of`."""
    return (scales.double().log2() * FINENESS).round().to(torch.int16)


class Integers:
    """Matrices, encoded together. Each consists of integers and of the exponents of its row scales and column scales.

    Each row and each column has a *level*. The sum of the levels of its row and its column selects the table of
    probabilities of an integer; see `freebits.codecs.integer_stream`.

    Layout of part `message`, little-endian: size of the side data in bytes (u32); side data (zstd); bitstream (u16).
    The side data has for each matrix the row exponents and column exponents (i16), then the row levels and column
    levels (i8).

    With a trellis, the integers of each column are on a path through the trellis: even in even states, odd in odd
    states; see `freebits.codecs.trellis`. The number of states is the parameter `trellis`.

    Args:
        n_states: number of states of the trellis with which `encode` encodes; 0 for no trellis.
    """

    exact = False
    check = Check.DIGEST
    param_names = frozenset({"bytes", "trellis"})

    def __init__(self, n_states: int = 0) -> None:
        self._n_states = n_states

    def encode(self, tensors: Sequence[Tensor], makes: Sequence[TensorSpec]) -> Coded:  # noqa: ARG002
        """Encode matrices. `tensors` has the three tensors of a `ScaledIntegers` for each matrix."""
        streams, side_data = [], []
        for start in range(0, len(tensors), 3):
            integers, *exponents = tensors[start : start + 3]
            levels = _levels(integers / 2 if self._n_states else integers)
            streams.append((np.ascontiguousarray(integers.numpy()), *levels))
            side_data += [*(e.numpy().astype("<i2").tobytes() for e in exponents), *(v.tobytes() for v in levels)]
        compressed = zstd.compress(b"".join(side_data), _ZSTD_LEVEL)
        bitstream = integer_stream.encode(streams, bool(self._n_states)).astype("<u2").tobytes()
        message = np.array([len(compressed)], "<u4").tobytes() + compressed + bitstream
        trellis = {_TRELLIS: self._n_states} if self._n_states else {}
        return Coded({MESSAGE: as_tensor(message)}, {"bytes": len(message), **trellis})

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params) -> list[Tensor]:
        """Return the matrices as floats."""
        decoder, all_side_data = _read_message(parts, makes, params)
        matrices = []
        for spec, side_data in zip(makes, all_side_data, strict=True):
            matrix, (n, m) = torch.empty(spec.shape, dtype=spec.dtype), spec.shape
            row_scales, column_scales = (scales_of(e).numpy() for e in (side_data.rows, side_data.columns))
            states, one_row = np.zeros(m, np.uint8), np.empty((1, m), np.int32)
            n_rows = max(1, _DECODED_AT_ONCE // max(1, m))
            floats = np.empty((n_rows, m), np.float32)
            for start in range(0, n, n_rows):
                chunk = slice(start, min(n, start + n_rows))
                levels, filled = (side_data.row_levels[chunk], side_data.column_levels), floats[: chunk.stop - start]
                decoder.decode(*levels, states, one_row, filled, row_scales[chunk], column_scales)
                matrix[chunk] = torch.from_numpy(filled)
            matrices.append(matrix)
        decoder.finish()
        return matrices

    def chunks(
        self, parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params, n_rows: int = 1 << 62
    ) -> Iterator[IntegerChunk]:
        """Yield the integers of all matrices in order, `n_rows` rows at a time. Each matrix has at least one chunk.

        By default, each matrix is one chunk.

        Raises:
            ValueError: the message is damaged.
        """
        decoder, all_side_data = _read_message(parts, makes, params)
        for number, (spec, side_data) in enumerate(zip(makes, all_side_data, strict=True)):
            n, m = spec.shape
            integers, states = np.empty((min(n, n_rows), m), np.int32), np.zeros(m, np.uint8)
            no_floats, no_scales = np.empty((0, m), np.float32), np.empty(0, np.float32)
            for start in range(0, max(n, 1), n_rows):
                levels, before = side_data.row_levels[start : start + n_rows], states.copy()
                chunk = integers[: len(levels)]
                decoder.decode(levels, side_data.column_levels, states, chunk, no_floats, no_scales, no_scales)
                scales = side_data.rows, side_data.columns
                yield IntegerChunk(number, start, *scales, params.get(_TRELLIS, 0), before, chunk)
        decoder.finish()

    def parts(self, makes: Sequence[TensorSpec], params: Params) -> dict[str, TensorSpec]:
        """Return the spec of the message, which has `params["bytes"]` bytes."""
        for spec in makes:
            if spec.dtype_name not in FLOATS or len(spec.shape) != 2:
                raise ValueError(f"the `integers` code makes matrices of floats, not {spec}")
        n_states = params.get(_TRELLIS, 0)
        if type(n_states) is not int or n_states not in (0, *POLYNOMIALS):
            raise ValueError(f"there is no trellis with {n_states!r} states")
        return {MESSAGE: bytes_spec(params["bytes"])}


def separate_variances(squares: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Return factors of the rows, (n,), and of the columns, (m,), of a matrix of squares, (n, m).

    Their products fit the mean squares: those of the columns are the factors of the columns, and the factors of the
    rows have a mean of about 1. No factor is below `least`.
    """
    columns = squares.mean(0).clamp_min_(least)
    return (squares / columns).mean(1).clamp_min_(least), columns


def _levels(integers: Tensor) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Return the levels of the rows, (n,), and of the columns, (m,), that fit the mean squares of integers, (n, m)."""
    squares = integers.double().square_()
    rows, _ = separate_variances(squares, _MIN_VARIANCE)
    columns = (squares / rows[:, None]).mean(0)
    typical = rows.log().mean().exp()
    # rounding to integers adds 1/12 to the variance; the levels describe the values before rounding
    variances = (rows / typical, (columns * typical - 1 / 12).clamp_min_(_MIN_VARIANCE))
    levels = [(variance.log2() * LEVELS_PER_OCTAVE / 2).round().clamp(-64, 63) for variance in variances]
    return levels[0].numpy().astype(np.int8), levels[1].numpy().astype(np.int8)


@dataclass(frozen=True)
class _SideData:
    """Side data of a matrix. Its rows, (n,), and columns, (m,), have exponents of scales (int16) and levels."""

    rows: Tensor
    columns: Tensor
    row_levels: NDArray[np.int8]
    column_levels: NDArray[np.int8]


def _read_message(
    parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params
) -> tuple[integer_stream.Decoder, list[_SideData]]:
    """Return a decoder of the bitstream, and the side data of each matrix. Raise `ValueError` if they are damaged."""
    message = bytes_from(parts[MESSAGE], params["bytes"])
    if len(message) < _HEADER_SIZE:
        raise ValueError("the message is cut off")
    end = _HEADER_SIZE + int(message[:_HEADER_SIZE].view("<u4")[0])
    if end > len(message) or (len(message) - end) % 2:
        raise ValueError("the message is cut off")
    side_data = list(_side_data(message[_HEADER_SIZE:end].tobytes(), [spec.shape for spec in makes]))
    bitstream = np.frombuffer(message[end:].tobytes(), "<u2")
    width = max((spec.shape[1] for spec in makes), default=0)
    return integer_stream.Decoder(bitstream, width, params.get(_TRELLIS, 0)), side_data


def _side_data(data: bytes, shapes: Sequence[tuple[int, ...]]) -> Iterator[_SideData]:
    """Yield the side data of each matrix."""
    n_bytes = sum(3 * (rows + columns) for rows, columns in shapes)
    content = decompressed(data, n_bytes)
    if len(content) != n_bytes:
        raise ValueError(f"the side data does not have exactly the {n_bytes} bytes that the matrices need")
    offset = 0
    for rows, columns in shapes:
        arrays = []
        for size, dtype in ((rows, "<i2"), (columns, "<i2"), (rows, "<i1"), (columns, "<i1")):
            arrays.append(np.frombuffer(content, dtype, size, offset).astype(dtype[1:]))
            offset += arrays[-1].nbytes
        if max(arrays[0].max(initial=0), arrays[1].max(initial=0)) > _MAX_EXPONENT:
            raise ValueError(f"an exponent is above {_MAX_EXPONENT}: its scale does not fit float32")
        yield _SideData(torch.from_numpy(arrays[0]), torch.from_numpy(arrays[1]), arrays[2], arrays[3])
