"""Pack integers into a fixed number of bits each, and convert bytes to tensors."""

import sys

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from freebits.types import Bytes, TensorSpec

if sys.version_info >= (3, 14):
    from compression import zstd as zstd
else:
    from backports import zstd as zstd

_ALIGNMENT = 8


def pack_bits(values: NDArray[np.int64], n_bits: int) -> bytes:
    """Pack each value, (n,), into `n_bits` bits, the most significant bit first. Zero bits fill the last byte."""
    bits = values[:, None] >> np.arange(n_bits)[::-1] & 1
    return np.packbits(bits.astype(np.uint8)).tobytes()


def unpack_bits(content: bytes, count: int, n_bits: int) -> NDArray[np.int64]:
    """Return the values, (count,); the inverse of `pack_bits`.

    Raises:
        ValueError: `content` has too few bits.
    """
    if len(content) * 8 < count * n_bits:
        raise ValueError(f"{len(content)} bytes do not hold {count} values of {n_bits} bits")
    bits = np.unpackbits(np.frombuffer(content, np.uint8), count=count * n_bits).reshape(count, n_bits)
    return bits.astype(np.int64) @ (1 << np.arange(n_bits, dtype=np.int64)[::-1])


def decompressed(frame: bytes | memoryview, max_length: int) -> bytes:
    """Return the content of a zstd frame, at most `max_length` bytes.

    Raises:
        ValueError: the frame is damaged or cut off, holds more bytes, or is followed by something.
    """
    decoder = zstd.ZstdDecompressor()
    try:
        content: bytes = decoder.decompress(frame, max_length=max_length)
    except zstd.ZstdError as error:
        raise ValueError(str(error)) from None
    if not decoder.eof or decoder.unused_data:
        raise ValueError(f"a zstd frame is cut off, holds more than {max_length} bytes, or is followed by other bytes")
    return content


def as_tensor(content: bytes) -> Tensor:
    """Return bytes as a uint8 tensor, padded with zeros to a multiple of 8 bytes to align the next tensor in a file."""
    spec = bytes_spec(len(content))
    padded = content.ljust(spec.n_bytes, b"\0")
    return torch.frombuffer(bytearray(padded), dtype=torch.uint8) if padded else torch.empty(0, dtype=torch.uint8)


def bytes_spec(n_bytes: int) -> TensorSpec:
    """Return the spec of the tensor to which `as_tensor` converts `n_bytes` bytes.

    Raises:
        ValueError: `n_bytes` is not an integer or is negative.
    """
    if type(n_bytes) is not int or n_bytes < 0:
        raise ValueError(f"{n_bytes!r} is not a number of bytes")
    return TensorSpec("U8", (-(-n_bytes // _ALIGNMENT) * _ALIGNMENT,))


def bytes_from(tensor: Tensor, n_bytes: int) -> Bytes:
    """Return the `n_bytes` bytes that `as_tensor` converted to a tensor, without the padding.

    Raises:
        ValueError: the padding is not zero.
    """
    content: Bytes = tensor.numpy()
    if content[n_bytes:].any():
        raise ValueError("the padding at the end is not zero")
    return content[:n_bytes]
