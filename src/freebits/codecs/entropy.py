"""Entropy-code byte planes (see `planes`), chunk by chunk. Planes that would shrink too little are stored unchanged.

The coder is zstd without its search for matches, so only its Huffman code for literals remains. This code suits
weights: some exponents are frequent, but sequences of bytes hardly ever repeat.

Layout, little-endian: the number of values per chunk (u32); the stored size in bytes of each plane of each chunk (u32);
then the planes, one after another. A plane whose stored size is its original size is stored unchanged.
"""

import threading
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from freebits.codecs.base import Check, Coded, Declined, Params
from freebits.codecs.bits import as_tensor, bytes_from, bytes_spec, decompressed, zstd
from freebits.codecs.planes import merge, n_planes, split
from freebits.types import Bytes, TensorSpec, bytes_of

PART = "entropy"
CHUNK, FINE_CHUNK = 1 << 20, 1 << 15
"""Values per chunk. Large chunks need few Huffman tables. Fine chunks suit tensors whose regions differ in scale."""
MIN_SAVING = 0.02
"""The fraction of its bytes that a plane must save. A smaller saving is not worth the time to decode the plane."""
_SAMPLE_SIZE = 1 << 16
_BLOCK = 1 << 17  # the largest block of zstd; each block can have its own Huffman table
_COMPRESS_LITERALS = 1002  # ZSTD_c_literalCompressionMode in zstd.h; Python has no name for this option
_OPTIONS: dict[int, int] = {zstd.CompressionParameter.compression_level: -_BLOCK, _COMPRESS_LITERALS: 1}
"""At level `-n`, zstd skips about `n` bytes after it finds no match. This level skips the rest of the block."""
_local = threading.local()


class Entropy:
    """Any tensor, stored bit-exactly as entropy-coded bytes."""

    exact = True
    check = Check.DIGEST
    param_names = frozenset({"bytes"})

    def encode(self, tensors: Sequence[Tensor], makes: Sequence[TensorSpec]) -> Coded:
        """Encode one tensor.

        Raises:
            Declined: entropy coding saves too little; see `compress`.
        """
        [tensor], [spec] = tensors, makes
        coded = compress(bytes_of(tensor), spec.dtype_name)
        if coded is None:
            raise Declined("entropy coding saves too little")
        return Coded({PART: as_tensor(coded)}, {"bytes": len(coded)})

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params) -> list[Tensor]:
        """Return the tensor."""
        [spec] = makes
        return [spec.view(decompress(bytes_from(parts[PART], params["bytes"]), spec.dtype_name, spec.n_bytes))]

    def parts(self, makes: Sequence[TensorSpec], params: Params) -> dict[str, TensorSpec]:
        """Return the spec of the coded bytes, which must be fewer than the bytes of the tensor."""
        [spec], n_bytes = makes, params["bytes"]
        stored = bytes_spec(n_bytes)
        if not n_bytes < spec.n_bytes:
            raise ValueError(f"{n_bytes} coded bytes are not fewer than the {spec.n_bytes} bytes of {spec}")
        return {PART: stored}


def compress(data: Bytes, dtype_name: str) -> bytes | None:
    """Compress the bytes of a tensor. Return None if this saves at most 1 % plus 8 bytes.

    Args:
        data: (n,), the bytes of the tensor, little-endian.
        dtype_name: the safetensors dtype of the tensor.
    """
    chunk_size = _chunk_size(data, dtype_name)
    chunk_bytes = chunk_size * n_planes(dtype_name)
    chunks = (data[start : start + chunk_bytes] for start in range(0, len(data), chunk_bytes))
    planes = [_compress_plane(plane) for chunk in chunks for plane in split(chunk, dtype_name)]
    table = np.array([chunk_size, *map(len, planes)], "<u4").tobytes()
    coded = b"".join([table, *planes])
    return coded if len(coded) < (1 - MIN_SAVING / 2) * len(data) - 8 else None  # 8 bytes for padding


def decompress(coded: Bytes, dtype_name: str, n_bytes: int) -> Bytes:
    """Return the bytes of a tensor; the inverse of `compress`.

    Args:
        coded: (m,), the result of `compress`.
        dtype_name: the safetensors dtype of the tensor.
        n_bytes: the number of bytes of the tensor.

    Raises:
        ValueError: the coded bytes are damaged or belong to another tensor, or the tensor does not fit in memory.
    """
    width = n_planes(dtype_name)
    chunk_size = int(coded[:4].view("<u4")[0]) if len(coded) >= 4 else 0
    if not chunk_size or n_bytes < 0 or n_bytes % width:
        raise ValueError(f"{n_bytes} bytes of {dtype_name} cannot be divided into chunks of {chunk_size} values")
    offset = 4 + 4 * width * -(-n_bytes // (chunk_size * width))
    if offset > len(coded):
        raise ValueError("the table of plane sizes is cut off")
    table = coded[4:offset].view("<u4")
    if offset + int(table.sum(dtype=np.int64)) != len(coded):
        raise ValueError("the planes do not have the sizes in the table")
    sizes = iter(table.tolist())
    try:
        data = np.empty(n_bytes, np.uint8)
    except MemoryError:
        raise ValueError(f"{n_bytes} bytes do not fit in memory") from None
    for start in range(0, n_bytes, chunk_size * width):
        out = data[start : start + chunk_size * width]
        planes = []
        for _ in range(width):
            size = next(sizes)
            planes.append(_decompress_plane(coded[offset : offset + size], size, len(out) // width))
            offset += size
        merge(planes, dtype_name, out)
    return data


def _chunk_size(data: Bytes, dtype_name: str) -> int:
    """Return `FINE_CHUNK` if chunks of that size take at least 0.2 % fewer bytes, else `CHUNK`.

    The function compares both for the first block of the most significant plane.
    """
    block = split(data[: _BLOCK * n_planes(dtype_name)], dtype_name)[0]
    sizes = [len(_frame(block[start : start + FINE_CHUNK])) for start in range(0, len(block), FINE_CHUNK)]
    return CHUNK if len(_frame(block)) <= 1.002 * sum(sizes) else FINE_CHUNK


def _compress_plane(plane: Bytes) -> bytes:
    """Compress a plane. Return it unchanged if compressing a sample or the whole plane saves less than `MIN_SAVING`."""
    sample = plane[len(plane) // 2 :][:_SAMPLE_SIZE]
    if len(sample) == _SAMPLE_SIZE and len(_frame(sample)) > (1 - MIN_SAVING) * _SAMPLE_SIZE:
        return plane.tobytes()
    frame = _frame(plane)
    return frame if len(frame) <= (1 - MIN_SAVING) * len(plane) else plane.tobytes()


def _decompress_plane(coded: Bytes, size: int, length: int) -> Bytes:
    if len(coded) != size or size > length:
        raise ValueError("a plane is cut off or too large")
    if size == length:
        return coded
    plane = decompressed(coded.data, length)
    if len(plane) != length:
        raise ValueError(f"a zstd frame does not hold exactly one plane of {length} bytes")
    return np.frombuffer(plane, np.uint8)


def _frame(plane: Bytes) -> bytes:
    """Compress a plane to a zstd frame. Each thread has its own compressor, because threads cannot share one."""
    if not hasattr(_local, "compressor"):
        _local.compressor = zstd.ZstdCompressor(options=_OPTIONS)
    frame: bytes = _local.compressor.compress(plane.data, zstd.ZstdCompressor.FLUSH_FRAME)
    return frame
