"""Entropy-code the planes that gain, chunk by chunk; store the others as they are.

The coder is zstd with its search for matches switched off, which leaves its Huffman code for literals: weights repeat
in how often an exponent occurs, not in sequences.

Layout, little-endian: numbers a chunk (u32); for each chunk and plane the bytes it takes (u32), as many as the plane
has where it is stored as it is; then those planes, one after another.
"""

import threading
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from freebits.codecs.bits import as_tensor, bytes_from, bytes_spec, zstd
from freebits.codecs.code import Coded, Declined, Params
from freebits.codecs.planes import merge, n_planes, split
from freebits.types import Bytes, TensorSpec, bytes_of

PART = "entropy"
CHUNK, FINE_CHUNK = 1 << 20, 1 << 15
"""Numbers a chunk: so many that tables cost next to nothing; or few, for a tensor whose parts differ in scale."""
LEAST_GAIN = 0.02
"""A plane that gains less is not worth the time to decode it."""
_SAMPLE = 1 << 16
_BLOCK = 1 << 17  # zstd makes a new table for each
_COMPRESS_LITERALS = 1002  # ZSTD_c_literalCompressionMode, which zstd.h has and Python does not name
_OPTIONS: dict[int, int] = {zstd.CompressionParameter.compression_level: -_BLOCK, _COMPRESS_LITERALS: 1}
"""The level of a number below zero is how far to step after a miss: here, over all of a block."""
_local = threading.local()


class Entropy:
    """Any tensor, bit for bit, as bytes."""

    exact = True

    def encode(self, tensors: Sequence[Tensor], makes: Sequence[TensorSpec]) -> Coded:
        """One tensor; declined where it gains less than 1 %."""
        [tensor], [spec] = tensors, makes
        coded = compress(bytes_of(tensor), spec.code)
        if coded is None:
            raise Declined("its numbers are spread too evenly")
        return Coded({PART: as_tensor(coded)}, {"bytes": len(coded)})

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params) -> list[Tensor]:
        """The tensor."""
        [spec] = makes
        return [spec.view(decompress(bytes_from(parts[PART], params["bytes"]), spec.code, spec.n_bytes))]

    def parts(self, makes: Sequence[TensorSpec], params: Params) -> dict[str, TensorSpec]:
        """Bytes, as many as coding found it to take; fewer than of the tensor."""
        [spec], n_bytes = makes, params["bytes"]
        stored = bytes_spec(n_bytes)
        if not n_bytes < spec.n_bytes:
            raise ValueError(f"{n_bytes} bytes for {spec}")
        return {PART: stored}


def compress(data: Bytes, code: str) -> bytes | None:
    """The bytes of a tensor in fewer bytes; None where that gains less than 1 %.

    Args:
        data: (n,), the tensor's bytes, little-endian.
        code: its safetensors dtype.
    """
    chunk_size = _chunk_size(data, code)
    step = chunk_size * n_planes(code)
    chunks = (data[start : start + step] for start in range(0, len(data), step))
    planes = [_compress_plane(plane) for chunk in chunks for plane in split(chunk, code)]
    table = np.array([chunk_size, *map(len, planes)], "<u4").tobytes()
    coded = b"".join([table, *planes])
    return coded if len(coded) < (1 - LEAST_GAIN / 2) * len(data) - 8 else None  # the file fills it up to 8 bytes


def decompress(coded: Bytes, code: str, n_bytes: int) -> Bytes:
    """The bytes of a tensor, inverse of `compress`.

    Args:
        coded: (m,), what `compress` gave.
        code: the tensor's safetensors dtype.
        n_bytes: of the tensor.

    Raises:
        ValueError: that is not what `compress` gave for such a tensor.
    """
    width = n_planes(code)
    chunk = int(coded[:4].view("<u4")[0]) if len(coded) >= 4 else 0
    if not chunk or n_bytes < 0 or n_bytes % width:
        raise ValueError("no chunks")
    at = 4 + 4 * width * -(-n_bytes // (chunk * width))
    if at > len(coded):
        raise ValueError("a table that is cut off")
    told = coded[4:at].view("<u4")
    if at + int(told.sum(dtype=np.int64)) != len(coded):
        raise ValueError("planes of other sizes than its table says")
    sizes = iter(told.tolist())
    try:
        data = np.empty(n_bytes, np.uint8)
    except MemoryError:
        raise ValueError(f"{n_bytes} bytes do not fit in memory") from None
    for start in range(0, n_bytes, chunk * width):
        out = data[start : start + chunk * width]
        planes = []
        for _ in range(width):
            size = next(sizes)
            planes.append(_decompress_plane(coded[at : at + size], size, len(out) // width))
            at += size
        merge(planes, code, out)
    return data


def _chunk_size(data: Bytes, code: str) -> int:
    """`CHUNK` if the first block codes as well whole as in pieces, else `FINE_CHUNK`."""
    first = split(data[: _BLOCK * n_planes(code)], code)[0]
    parts = [len(_coded(first[at : at + FINE_CHUNK])) for at in range(0, len(first), FINE_CHUNK)]
    return CHUNK if len(_coded(first)) <= 1.002 * sum(parts) else FINE_CHUNK


def _compress_plane(plane: Bytes) -> bytes:
    """The plane in fewer bytes, or as it is; whether it gains is tried on a part of it."""
    sample = plane[len(plane) // 2 :][:_SAMPLE]
    if len(sample) == _SAMPLE and len(_coded(sample)) > (1 - LEAST_GAIN) * _SAMPLE:
        return plane.tobytes()
    coded = _coded(plane)
    return coded if len(coded) <= (1 - LEAST_GAIN) * len(plane) else plane.tobytes()


def _decompress_plane(coded: Bytes, size: int, length: int) -> Bytes:
    if len(coded) != size or size > length:
        raise ValueError("a plane that is cut off")
    if size == length:
        return coded
    decoder = zstd.ZstdDecompressor()
    try:
        plane = decoder.decompress(coded.data, max_length=length)
    except zstd.ZstdError as error:
        raise ValueError(str(error)) from None
    if len(plane) != length or not decoder.eof or decoder.unused_data:
        raise ValueError(f"not a plane of {length} numbers")
    return np.frombuffer(plane, np.uint8)


def _coded(plane: Bytes) -> bytes:
    """As a frame; a thread keeps its compressor, which cannot be shared."""
    if not hasattr(_local, "compressor"):
        _local.compressor = zstd.ZstdCompressor(options=_OPTIONS)
    frame: bytes = _local.compressor.compress(plane.data, zstd.ZstdCompressor.FLUSH_FRAME)
    return frame
