"""Whole numbers as bits of a fixed width, and bytes as tensors."""

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
    """Each value in `n_bits` bits, most significant first; the last byte is filled with zeros."""
    bits = values[:, None] >> np.arange(n_bits)[::-1] & 1
    return np.packbits(bits.astype(np.uint8)).tobytes()


def unpack_bits(content: bytes, count: int, n_bits: int) -> NDArray[np.int64]:
    """The inverse of `pack_bits`, (count,).

    Raises:
        ValueError: there are fewer bits than that.
    """
    if len(content) * 8 < count * n_bits:
        raise ValueError(f"{len(content)} bytes do not hold {count} numbers of {n_bits} bits")
    bits = np.unpackbits(np.frombuffer(content, np.uint8), count=count * n_bits).reshape(count, n_bits)
    return bits.astype(np.int64) @ (1 << np.arange(n_bits, dtype=np.int64)[::-1])


def as_tensor(content: bytes) -> Tensor:
    """Bytes as uint8, filled with zeros to a multiple of 8 so that what follows in a file stays aligned."""
    spec = bytes_spec(len(content))
    padded = content.ljust(spec.n_bytes, b"\0")
    return torch.frombuffer(bytearray(padded), dtype=torch.uint8) if padded else torch.empty(0, dtype=torch.uint8)


def bytes_spec(n_bytes: int) -> TensorSpec:
    """The kind of so many bytes as a tensor.

    Raises:
        ValueError: that is no number of bytes.
    """
    if type(n_bytes) is not int or n_bytes < 0:
        raise ValueError(f"{n_bytes!r} is no number of bytes")
    return TensorSpec("U8", (-(-n_bytes // _ALIGNMENT) * _ALIGNMENT,))


def bytes_from(tensor: Tensor, n_bytes: int) -> Bytes:
    """The bytes of which `as_tensor` made a tensor.

    Raises:
        ValueError: the bytes that fill it up are no zeros.
    """
    content: Bytes = tensor.numpy()
    if content[n_bytes:].any():
        raise ValueError("no zeros at its end")
    return content[:n_bytes]
