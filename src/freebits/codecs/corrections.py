"""Store the positions and the true values of wrongly decoded values (section 3.3 of arXiv 2410.01309, the paper).

The sorted positions are stored as *gaps*. A gap is the number of correct values between a wrong value and the previous
one. All gaps have the same width, the fewest bits that hold the largest gap. If the positions are random, a gap takes
fewer bits than a position. The paper stores positions, which take `⌈log₂ L⌉` bits each if there are `L` values.

Layout, little-endian: number of corrections (u32), bits per gap (u32), the true values, the gaps with the most
significant bit first, zeros up to a multiple of 8 bytes. If there are no corrections, there are no bytes.
"""

import struct

import numpy as np
import torch
from torch import Tensor

from freebits.codecs.bits import as_tensor, bytes_spec, pack_bits, unpack_bits

_HEADER = struct.Struct("<II")
_MAX_GAP_BITS = 40
_CHUNK = 1 << 22
"""Number of values that are compared at a time."""


def encode_corrections(true: Tensor, decoded: Tensor, threshold: float) -> Tensor:
    """Encode the corrections after which `decoded` differs from `true` by at most `threshold`.

    Args:
        true: (L,), 16-bit floats.
        decoded: (L,), in the dtype of `true`; a value that is not finite counts as wrong.
        threshold: the largest absolute error that is not corrected.

    Returns:
        (n_bytes,), uint8; empty if no value needs a correction.
    """
    wrong = [
        torch.nonzero(~(((actual.double() - expected.double()).abs() <= threshold) & actual.isfinite())).flatten()
        for actual, expected in zip(decoded.split(_CHUNK), true.split(_CHUNK), strict=True)
    ]
    positions = torch.cat([in_chunk + _CHUNK * index for index, in_chunk in enumerate(wrong)])
    if not len(positions):
        return as_tensor(b"")
    gaps = np.diff(positions.numpy(), prepend=-1) - 1
    n_bits = int(gaps.max()).bit_length()
    values = true[positions].view(torch.uint8).numpy().tobytes()
    return as_tensor(_HEADER.pack(len(positions), n_bits) + values + pack_bits(gaps, n_bits))


def apply_corrections(decoded: Tensor, corrections: Tensor) -> Tensor:
    """Return a copy of `decoded` with the corrections of `encode_corrections` applied.

    Raises:
        ValueError: the corrections are damaged or do not fit `decoded`.
    """
    corrected = decoded.clone()
    positions, values = read_corrections(corrections, decoded.dtype)
    if len(positions) and int(positions[-1]) >= len(decoded):
        raise ValueError(f"a correction has position {int(positions[-1])}, but there are only {len(decoded)} values")
    corrected[positions] = values
    return corrected


def read_corrections(corrections: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the positions (n,), int64, ascending, and the true values (n,) of encoded corrections.

    Raises:
        ValueError: the corrections are damaged.
    """
    if not len(corrections):
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=dtype)
    content = corrections.numpy().tobytes()
    count, n_bits = _HEADER.unpack_from(content.ljust(_HEADER.size, b"\0"))
    values_end = _HEADER.size + count * dtype.itemsize
    end = values_end + -(-count * n_bits // 8)
    if n_bits > _MAX_GAP_BITS or len(content) != bytes_spec(end).n_bytes or any(content[end:]):
        raise ValueError(f"{len(content)} bytes do not hold {count} corrections")
    gaps = unpack_bits(content[values_end:], count, n_bits)
    values = torch.frombuffer(bytearray(content[_HEADER.size : values_end]), dtype=dtype)
    return torch.from_numpy(np.cumsum(gaps + 1) - 1), values
