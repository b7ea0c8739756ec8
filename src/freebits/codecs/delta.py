"""Code a tensor bit for bit as its differences from a tensor of another model, the *base*.

A fine-tune, or a later checkpoint of a training run, changes each weight of its base a little. The code maps all floats
of a dtype, in ascending order, to consecutive integers, and codes the difference between the integers of two values.
The larger the exponent of the base's value, the farther apart are neighboring floats, and the smaller is the
difference. The expected size of a difference follows from this exponent and from the root mean squares of the changes
in its row and in its column. Differences of about the same expected size are coded with the same table of frequencies.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from freebits.codecs import symbol_stream
from freebits.codecs.base import Check, Coded, Declined, Params
from freebits.codecs.bits import as_tensor, bytes_from, bytes_spec, decompressed, zstd
from freebits.codecs.symbol_stream import N_CONTEXTS
from freebits.compiled import compiled
from freebits.types import Bytes, TensorSpec, bytes_of

BASE, MESSAGE = "base", "message"
MANTISSA_BITS = {"F8_E4M3": 3, "F8_E5M2": 2, "F16": 10, "BF16": 7, "F32": 23}
"""Number of mantissa bits of each dtype whose values are compared as floats. Other dtypes are compared byte by byte."""
CHUNK = 1 << 22
"""Rows are coded in chunks of about this many values. Each chunk has its own tables."""
LEVELS_PER_OCTAVE = 2
_HEADER_SIZE = 8
_UNCHANGED = -(1 << 14)
"""The level of a row or column without changes."""


class Delta:
    """A tensor, as differences from a tensor of the same dtype, whose first dimension can be larger or smaller.

    Rows that the base's tensor does not have are compared with zeros.

    Layout of part `message`, little-endian: for each chunk of rows, the number of bytes of the coded levels and of the
    coded differences (u32 each), the levels of its rows and then of all columns (i16, zstd), and the differences (see
    `symbol_stream`).
    """

    exact = False
    check = Check.DIGEST
    param_names = frozenset({"bytes", "rows"})

    def encode(self, tensors: Sequence[Tensor], makes: Sequence[TensorSpec]) -> Coded:
        """Encode a tensor. `tensors` has the tensor and the base's; both can be flat bytes.

        Raises:
            Declined: the message does not take fewer bytes than the tensor.
        """
        (tensor, base), [spec] = tensors, makes
        n_rows = base.nbytes // (spec.n_bytes // spec.shape[0]) if len(spec.shape) > 1 else 1
        values, base_values = _matrix(bytes_of(tensor), spec), _matrix(bytes_of(base), _base_spec(spec, n_rows))
        pieces = []
        for rows in _chunks(values):
            chunk, base_chunk = values[rows], _padded(base_values, rows)
            levels = _levels(chunk, base_chunk, spec.dtype_name)
            differences = np.empty(chunk.size, np.uint32)
            _subtract(chunk, base_chunk, _is_float(spec), differences)
            side_data = zstd.compress(b"".join(level.astype("<i2").tobytes() for level in levels))
            message = symbol_stream.encode(differences, _contexts(base_chunk, *levels, spec))
            pieces += [np.array([len(side_data), len(message)], "<u4").tobytes(), side_data, message]
        message = b"".join(pieces)
        if len(message) >= spec.n_bytes:
            raise Declined("the differences do not take fewer bytes than the tensor")
        return Coded({MESSAGE: as_tensor(message)}, {"bytes": len(message), "rows": n_rows})

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params) -> list[Tensor]:
        """Return the tensor."""
        [spec] = makes
        message = bytes_from(parts[MESSAGE], params["bytes"]).tobytes()
        base_values = _matrix(bytes_of(parts[BASE]), _base_spec(spec, params["rows"]))
        values, offset = _matrix(np.empty(spec.n_bytes, np.uint8), spec), 0
        for rows in _chunks(values):
            middle, end = (offset + _HEADER_SIZE + size for size in _sizes(message, offset))
            chunk, base_chunk = values[rows], _padded(base_values, rows)
            levels = _read_levels(message[offset + _HEADER_SIZE : middle], *chunk.shape)
            differences = symbol_stream.decode(message[middle:end], _contexts(base_chunk, *levels, spec))
            _add(differences, base_chunk, _is_float(spec), chunk)
            offset = end
        if offset != len(message):
            raise ValueError("the message does not end with its last chunk")
        return [spec.view(values.reshape(-1).view(np.uint8))]

    def parts(self, makes: Sequence[TensorSpec], params: Params) -> dict[str, TensorSpec]:
        """Return the specs of the message and of the base's tensor, which has `params["rows"]` rows."""
        [spec], n_rows = makes, params["rows"]
        valid = type(n_rows) is int and 0 < n_rows < 1 << 31 and (n_rows == 1 or len(spec.shape) > 1)
        if not valid or not are_partners(spec, _base_spec(spec, n_rows)):
            raise ValueError(f"{spec} cannot be compared with a tensor of {n_rows!r} rows")
        message = bytes_spec(params["bytes"])
        if not params["bytes"] < spec.n_bytes:
            raise ValueError(f"{params['bytes']} bytes are not fewer than the {spec.n_bytes} bytes of {spec}")
        return {MESSAGE: message, BASE: _base_spec(spec, n_rows)}


def are_partners(spec: TensorSpec, base: TensorSpec) -> bool:
    """Return whether `delta` can code a tensor with a base's: same dtype, and same shape except the first dimension."""
    if spec.dtype_name != base.dtype_name or not spec.n_bytes or not base.n_bytes:
        return False
    whole_rows = len(spec.shape) > 1 and spec.n_bytes % prod(spec.shape[:-1]) == 0
    return spec.shape == base.shape or (whole_rows and spec.shape[1:] == base.shape[1:])


def _base_spec(spec: TensorSpec, n_rows: int) -> TensorSpec:
    """Return the spec of the base's tensor. `n_rows` is its first dimension, and is ignored for a vector."""
    return TensorSpec(spec.dtype_name, (n_rows, *spec.shape[1:])) if len(spec.shape) > 1 else spec


def _is_float(spec: TensorSpec) -> bool:
    return spec.dtype_name in MANTISSA_BITS


def _matrix(data: Bytes, spec: TensorSpec) -> NDArray[np.unsignedinteger]:
    """Return the bytes of a tensor as a matrix of unsigned integers. Its rows run along the tensor's last dimension."""
    n = prod(spec.shape[:-1]) if spec.n_bytes % prod(spec.shape[:-1]) == 0 else 1
    return data.view(f"<u{spec.bits // 8}" if _is_float(spec) else np.uint8).reshape(n, -1)


def _chunks(values: NDArray[np.unsignedinteger]) -> Iterator[slice]:
    n, m = values.shape
    size = max(1, CHUNK // m)
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def _padded(base_values: NDArray[np.unsignedinteger], rows: slice) -> NDArray[np.unsignedinteger]:
    """Return some rows of the base's tensor, and zeros for rows after its end."""
    chunk = base_values[rows]
    missing = rows.stop - rows.start - len(chunk)
    return np.pad(chunk, ((0, missing), (0, 0))) if missing else chunk


def _levels(
    values: NDArray[np.unsignedinteger], base: NDArray[np.unsignedinteger], dtype_name: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the levels of rows and of columns: root mean squares of the changes, as logarithms in half octaves.

    The level of a difference is that of its row plus that of its column, minus that of the base value's exponent.
    """
    as_floats = [
        TensorSpec(dtype_name if dtype_name in MANTISSA_BITS else "U8", matrix.shape).view(
            np.ascontiguousarray(matrix).reshape(-1).view(np.uint8)
        )
        for matrix in (values, base)
    ]
    squares = (as_floats[0].float() - as_floats[1].float()).square_().nan_to_num_(0, 0, 0)
    rows = squares.mean(1)
    columns = rows.clamp_min(1e-30).reciprocal_() @ squares / len(rows)
    row_levels, column_levels = (
        (mean.log2() * (LEVELS_PER_OCTAVE / 2)).round().clamp(_UNCHANGED, -_UNCHANGED).numpy().astype(np.int64)
        for mean in (rows, columns)
    )
    return row_levels, column_levels


def _contexts(
    base: NDArray[np.unsignedinteger], row_levels: NDArray[np.int64], column_levels: NDArray[np.int64], spec: TensorSpec
) -> NDArray[np.uint8]:
    """Return the context of each difference: the level of its expected size, shifted and clamped."""
    contexts, n_mantissa = np.empty(base.size, np.uint8), MANTISSA_BITS.get(spec.dtype_name, 8)
    # the exponent of floats that are one apart
    unit = (1 << spec.bits - n_mantissa - 2) - 1 + n_mantissa if _is_float(spec) else 1
    _find_contexts(base, row_levels + LEVELS_PER_OCTAVE * unit, column_levels, n_mantissa, contexts)
    return contexts


def _sizes(message: bytes, offset: int) -> tuple[int, int]:
    """Return where the levels and the differences of the chunk at an offset end, counted from the end of its header."""
    sizes = np.frombuffer(message[offset : offset + _HEADER_SIZE], "<u4").tolist()
    if len(sizes) < 2 or offset + _HEADER_SIZE + sum(sizes) > len(message):
        raise ValueError("the message is cut off")
    return sizes[0], sum(sizes)


def _read_levels(content: bytes, n: int, m: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the levels of `n` rows and of `m` columns."""
    data = decompressed(content, 2 * (n + m))
    if len(data) != 2 * (n + m):
        raise ValueError(f"the levels do not have exactly the {2 * (n + m)} bytes that the chunk needs")
    levels = np.frombuffer(data, "<i2").astype(np.int64)
    return levels[:n], levels[n:]


@compiled
def _find_contexts(
    base: NDArray[np.unsignedinteger],
    row_levels: NDArray[np.int64],
    column_levels: NDArray[np.int64],
    n_mantissa: int,
    contexts: NDArray[np.uint8],
) -> None:
    n, m = base.shape
    magnitude = (1 << 8 * base.itemsize - 1) - 1
    for i in range(n):
        for j in range(m):
            exponent = max(1, (int(base[i, j]) & magnitude) >> n_mantissa)
            level = row_levels[i] + column_levels[j] - LEVELS_PER_OCTAVE * exponent + N_CONTEXTS // 2
            contexts[i * m + j] = min(max(level, 0), N_CONTEXTS - 1)


@compiled
def _subtract(
    values: NDArray[np.unsignedinteger],
    base: NDArray[np.unsignedinteger],
    is_float: bool,
    differences: NDArray[np.uint32],
) -> None:
    """Write the differences, modulo the number of values of the dtype: 0, -1, 1, -2, 2, … as 0, 1, 2, 3, 4, …."""
    n, m = base.shape
    all_bits, sign = (1 << 8 * base.itemsize) - 1, 1 << 8 * base.itemsize - 1
    for i in range(n):
        for j in range(m):
            value, base_value = np.int64(values[i, j]), np.int64(base[i, j])
            if is_float:  # map floats to integers in the same order
                value = value ^ all_bits if value & sign else value | sign
                base_value = base_value ^ all_bits if base_value & sign else base_value | sign
            difference = (value - base_value) & all_bits
            differences[i * m + j] = 2 * difference if difference < sign else 2 * (all_bits - difference) + 1


@compiled
def _add(
    differences: NDArray[np.uint32],
    base: NDArray[np.unsignedinteger],
    is_float: bool,
    values: NDArray[np.unsignedinteger],
) -> None:
    """Add differences to the base's values; the inverse of `_subtract`."""
    n, m = base.shape
    all_bits, sign = (1 << 8 * base.itemsize) - 1, 1 << 8 * base.itemsize - 1
    for i in range(n):
        for j in range(m):
            coded, base_value = np.int64(differences[i * m + j]), np.int64(base[i, j])
            if is_float:
                base_value = base_value ^ all_bits if base_value & sign else base_value | sign
            value = base_value + (-(coded + 1 >> 1) if coded & 1 else coded >> 1) & all_bits
            if is_float:
                value = value ^ all_bits if not value & sign else value ^ sign
            values[i, j] = value
