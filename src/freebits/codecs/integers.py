"""Matrices of integers times a step for each row and each column, at as many bits as the integers are improbable."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from freebits.codecs import ans
from freebits.codecs.bits import as_tensor, bytes_from, bytes_spec, pack_bits, unpack_bits, zstd
from freebits.codecs.code import Coded, Params
from freebits.types import FLOATS, TensorSpec

MESSAGE = "message"
FINENESS = 16
"""Steps are `2^(e / FINENESS)` for whole `e`."""
_LARGEST = 128 * FINENESS - 1
"""Of float32."""
_ROOT = sqrt(sqrt(sqrt(sqrt(2.0))))  # IEEE rounds square roots and products alike everywhere
_POWERS = np.array([np.prod([1.0] + [_ROOT] * power) for power in range(FINENESS)])
_HEAD = 4 * 2
_SIDE_LEVEL = 19
_CHUNK = 1 << 17
_AT_ONCE = 1 << 20
_TOP = ans.LEVELS[-1] + 18 * ans.PER_OCTAVE
"""The last level: integers of 24 bits."""


@dataclass(frozen=True)
class ScaledIntegers:
    """A matrix `integers * 2^(rows / 16) * 2^(columns / 16)`.

    Attributes:
        integers: (n, m), int32.
        rows: (n,), int16.
        columns: (m,), int16.
    """

    integers: Tensor
    rows: Tensor
    columns: Tensor

    def floats(self, dtype: torch.dtype) -> Tensor:
        """The matrix, (n, m), in float32 and then rounded to `dtype`."""
        return (self.integers.float() * steps(self.columns) * steps(self.rows)[:, None]).to(dtype)


def steps(exponents: Tensor) -> Tensor:
    """`2^(e / 16)` in float32, the same on all machines."""
    octaves, parts = np.divmod(exponents.numpy().astype(np.int32), FINENESS)
    return torch.from_numpy(np.ldexp(_POWERS[parts], octaves).astype(np.float32))


def exponents(steps: Tensor) -> Tensor:
    """The inverse of `steps` for any positive numbers, to the nearest step; int16."""
    return (steps.double().log2() * FINENESS).round().to(torch.int16)


class Integers:
    """Matrices, together: for each the integers, the exponents of its rows' steps and those of its columns'.

    The integers of a row and of a column have about one scale. What is told of both, to a quarter of an octave, says in
    which table of `freebits.codecs.ans` an integer is coded. Of integers too large for any table only the upper bits
    are, as the lower ones are as good as random.

    Message, little-endian: bytes of the side data, how many integers are in no table (u32 each); side data (zstd);
    those integers (i32); lower bits; words (u16). Side data: for each matrix the exponents of its rows and of its
    columns (i16), then the levels of both (i8).
    """

    exact = False

    def encode(self, tensors: Sequence[Tensor], makes: Sequence[TensorSpec]) -> Coded:  # noqa: ARG002
        """Three tensors for each matrix, see `ScaledIntegers`."""
        matrices = [ScaledIntegers(*tensors[at : at + 3]) for at in range(0, len(tensors), 3)]
        levels = [_levels(matrix.integers) for matrix in matrices]
        numbers = [
            matrix.integers.numpy()[np.ix_(*map(_order, told))] for matrix, told in zip(matrices, levels, strict=True)
        ]
        segments: dict[int, list[NDArray[np.int32]]] = {}
        for level, matrix, rows, columns in _blocks(levels):
            segments.setdefault(level, []).append(numbers[matrix][rows, columns].reshape(-1))
        coarse, lower = [], []
        for level, parts in segments.items():
            joined, n_lower = np.concatenate(parts), _n_lower(level)
            coarse.append((level - ans.PER_OCTAVE * n_lower, joined >> n_lower))
            lower.append(_pack(joined, n_lower))
        words, escaped = ans.encode(coarse)
        side = b"".join(
            part.tobytes()
            for matrix, told in zip(matrices, levels, strict=True)
            for part in (*(e.numpy().astype("<i2") for e in (matrix.rows, matrix.columns)), *told)
        )
        side = zstd.compress(side, _SIDE_LEVEL)
        head = np.array([len(side), len(escaped)], "<u4").tobytes()
        message = b"".join([head, side, escaped.astype("<i4").tobytes(), *lower, words.astype("<u2").tobytes()])
        return Coded({MESSAGE: as_tensor(message)}, {"bytes": len(message)})

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params) -> list[Tensor]:
        """The matrices, in floats; a few rows at a time, which stay near the processor."""
        decoded = []
        for spec, (ordered, rows, columns, of_rows, of_columns) in zip(makes, _read(parts, makes, params), strict=True):
            matrix = torch.empty(spec.shape, dtype=spec.dtype)
            column, row = steps(of_columns), steps(of_rows)[:, None]
            chunk = max(1, _CHUNK // max(1, spec.shape[1]))
            for start in range(0, spec.shape[0], chunk):
                here = slice(start, start + chunk)
                integers = ordered.index_select(0, rows[here]).index_select(1, columns)
                matrix[here] = integers.float().mul_(column).mul_(row[here])
            decoded.append(matrix)
        return decoded

    def parts(self, makes: Sequence[TensorSpec], params: Params) -> dict[str, TensorSpec]:
        """Bytes, as many as coding found it to take."""
        for spec in makes:
            if spec.code not in FLOATS or len(spec.shape) != 2:
                raise ValueError(f"a matrix of steps {spec}")
        return {MESSAGE: bytes_spec(params["bytes"])}

    def scaled_integers(
        self, parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params
    ) -> Iterator[ScaledIntegers]:
        """The matrices as integers and exponents.

        Raises:
            ValueError: the message is damaged.
        """
        for ordered, rows, columns, of_rows, of_columns in _read(parts, makes, params):
            yield ScaledIntegers(ordered[rows][:, columns].int(), of_rows, of_columns)


def _read(
    parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Of each matrix the integers by level, where its rows and its columns are among them, and their exponents."""
    message = bytes_from(parts[MESSAGE], params["bytes"])
    if len(message) < _HEAD:
        raise ValueError("a message that is cut off")
    n_side, n_escaped = (int(n) for n in message[:_HEAD].view("<u4"))
    at = _HEAD + n_side
    if at + 4 * n_escaped > len(message):
        raise ValueError("a message that is cut off")
    escaped = np.frombuffer(message[at : at + 4 * n_escaped].tobytes(), "<i4").astype(np.int32)
    shapes = [spec.shape for spec in makes]
    told = list(_side(message[_HEAD:at].tobytes(), shapes))
    blocks = _blocks([side[2:] for side in told])
    lengths: dict[int, int] = {}
    for level, _, rows, columns in blocks:
        lengths[level] = lengths.get(level, 0) + (rows.stop - rows.start) * (columns.stop - columns.start)
    ends = np.cumsum([0, *(-(-n * _n_lower(level) // 8) for level, n in lengths.items())]) + at + 4 * n_escaped
    lower = {level: message[start:end].tobytes() for level, start, end in zip(lengths, ends, ends[1:], strict=False)}
    rest = message[int(ends[-1]) :].tobytes()
    if ends[-1] > len(message) or len(rest) % 2:
        raise ValueError("a message that is cut off")
    coarse = [(level - ans.PER_OCTAVE * _n_lower(level), n) for level, n in lengths.items()]
    small = not ends[-1] > ends[0] and (not len(escaped) or -(2**15) <= escaped.min() <= escaped.max() < 2**15)
    numbers = [np.empty(shape, np.int16 if small else np.int32) for shape in shapes]
    decoded = ans.decode(np.frombuffer(rest, "<u2"), coarse, escaped)
    at, now = 0, None
    for level, matrix, rows, columns in blocks:
        if level != now:
            segment, now, at = _joined(next(decoded), lower[level], _n_lower(level)), level, 0
        into = numbers[matrix][rows, columns]
        into[:] = segment[at : at + into.size].reshape(into.shape)
        at += into.size
    for _ in decoded:  # what it has to say against its end
        pass
    for ordered, (of_rows, of_columns, *levels) in zip(numbers, told, strict=True):
        rows_, columns_ = (torch.from_numpy(np.argsort(_order(of))) for of in levels)
        yield torch.from_numpy(ordered), rows_, columns_, torch.from_numpy(of_rows), torch.from_numpy(of_columns)


def _levels(integers: Tensor) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """How large the integers of a row are, and those of a column, in levels; the sum of both is that of a number."""
    squares = integers.double().square_()
    columns = squares.mean(0).clamp_min_(_LEAST)
    rows = (squares / columns).mean(1).clamp_min_(_LEAST)
    columns = (squares / rows[:, None]).mean(0)
    typical = rows.log().mean().exp()
    told = (rows / typical, (columns * typical - 1 / 12).clamp_min_(_LEAST))
    logs = [(of.log2() * ans.PER_OCTAVE / 2).round().clamp(-64, 63) for of in told]
    return logs[0].numpy().astype(np.int8), logs[1].numpy().astype(np.int8)


_LEAST = 1e-3


def _n_lower(level: int) -> int:
    """Bits by which integers of a level are larger than those of the last table."""
    return max(0, -(-(level - ans.LEVELS[-1]) // ans.PER_OCTAVE))


def _pack(numbers: NDArray[np.int32], n_bits: int) -> bytes:
    """Their lower bits."""
    if not n_bits:
        return b""
    parts = [numbers[at : at + _AT_ONCE].astype(np.int64) for at in range(0, len(numbers), _AT_ONCE)]
    return b"".join(pack_bits(part & (1 << n_bits) - 1, n_bits) for part in parts)


def _joined(upper: ans.Decoded, lower: bytes, n_bits: int) -> ans.Decoded:
    """The inverse."""
    if not n_bits:
        return upper
    joined = upper.astype(np.int32) << n_bits
    for at in range(0, len(joined), _AT_ONCE):
        here = joined[at : at + _AT_ONCE]
        here |= unpack_bits(lower[at * n_bits // 8 :], len(here), n_bits).astype(np.int32)
    return joined


def _order(levels: NDArray[np.int8]) -> NDArray[np.int64]:
    return np.argsort(levels, kind="stable")


def _blocks(levels: Sequence[tuple[NDArray[np.int8], ...]]) -> list[tuple[int, int, slice, slice]]:
    """Where all matrices, rows and columns in the order of their levels, have one level: it, matrix, rows, columns."""
    blocks = []
    for matrix, told in enumerate(levels):
        rows, columns = (_runs(of) for of in told)
        for of_row, row_slice in rows:
            for of_column, column_slice in columns:
                level = min(max(of_row + of_column, ans.LEVELS[0]), _TOP)
                blocks.append((level, matrix, row_slice, column_slice))
    return sorted(blocks, key=lambda block: block[:2])


def _runs(levels: NDArray[np.int8]) -> list[tuple[int, slice]]:
    values, counts = np.unique(levels, return_counts=True)
    ends = np.cumsum(counts)
    return [(int(v), slice(int(end - n), int(end))) for v, n, end in zip(values, counts, ends, strict=True)]


def _side(data: bytes, shapes: Sequence[tuple[int, ...]]) -> Iterator[tuple[NDArray[Any], ...]]:
    n_bytes = sum(3 * (rows + columns) for rows, columns in shapes)
    decoder = zstd.ZstdDecompressor()
    try:
        side = decoder.decompress(data, max_length=n_bytes)
    except zstd.ZstdError as error:
        raise ValueError(str(error)) from None
    if len(side) != n_bytes or not decoder.eof or decoder.unused_data:
        raise ValueError("side data of another size than the matrices have")
    at = 0
    for rows, columns in shapes:
        told = []
        for size, dtype in ((rows, "<i2"), (columns, "<i2"), (rows, "<i1"), (columns, "<i1")):
            told.append(np.frombuffer(side, dtype, size, at).astype(dtype[1:]))
            at += told[-1].nbytes
        if max(told[0].max(initial=0), told[1].max(initial=0)) > _LARGEST:
            raise ValueError("a step that no float32 holds")
        yield tuple(told)
