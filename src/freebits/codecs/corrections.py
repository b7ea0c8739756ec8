"""The correction code: positions and true values of the words a decoder gets wrong (paper, section 3.3).

Positions are sorted and stored as gaps of a fixed number of bits, the fewest that hold the largest gap:
random positions then take fewer bits than the paper's `⌈log₂ L⌉`.

Layout, little-endian: number of corrections (u32), bits of a gap (u32), the true words, the gaps most
significant bit first, zeros up to a multiple of 8 bytes. Nothing at all where there is no correction.
"""

import struct

import numpy as np
import torch
from torch import Tensor

from freebits.codecs.bits import as_tensor, bytes_spec, pack_bits, unpack_bits

_HEADER = struct.Struct("<II")
_MOST_GAP_BITS = 40
_AT_ONCE = 1 << 22


def encode_corrections(true: Tensor, decoded: Tensor, threshold: float) -> Tensor:
    """What turns `decoded` into words that differ from `true` by at most `threshold`.

    Args:
        true: (L,), 16-bit floats.
        decoded: (L,), same dtype; a word that is not finite counts as wrong.
        threshold: the largest error left alone.

    Returns:
        (n_bytes,), uint8.
    """
    wrong = [
        torch.nonzero(~(((some.double() - of.double()).abs() <= threshold) & some.isfinite())).flatten()
        for some, of in zip(decoded.split(_AT_ONCE), true.split(_AT_ONCE), strict=True)
    ]
    positions = torch.cat([of + _AT_ONCE * number for number, of in enumerate(wrong)])
    if not len(positions):
        return as_tensor(b"")
    gaps = np.diff(positions.numpy(), prepend=-1) - 1
    n_bits = int(gaps.max()).bit_length()
    words = true[positions].view(torch.uint8).numpy().tobytes()
    return as_tensor(_HEADER.pack(len(positions), n_bits) + words + pack_bits(gaps, n_bits))


def apply_corrections(decoded: Tensor, corrections: Tensor) -> Tensor:
    """`decoded` with its corrections put in, a new tensor; see `encode_corrections`.

    Raises:
        ValueError: the corrections do not fit.
    """
    corrected = decoded.clone()
    positions, words = read_corrections(corrections, decoded.dtype)
    if len(positions) and int(positions[-1]) >= len(decoded):
        raise ValueError(f"a correction for word {int(positions[-1])} of {len(decoded)}")
    corrected[positions] = words
    return corrected


def read_corrections(corrections: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Positions (n,), int64, ascending, and true words (n,) of a correction code.

    Raises:
        ValueError: the code is cut off.
    """
    if not len(corrections):
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=dtype)
    content = corrections.numpy().tobytes()
    count, n_bits = _HEADER.unpack_from(content.ljust(_HEADER.size, b"\0"))
    words_end = _HEADER.size + count * dtype.itemsize
    end = words_end + -(-count * n_bits // 8)
    if n_bits > _MOST_GAP_BITS or len(content) != bytes_spec(end).n_bytes or any(content[end:]):
        raise ValueError(f"{len(content)} bytes do not hold {count} corrections")
    gaps = unpack_bits(content[words_end:], count, n_bits)
    words = torch.frombuffer(bytearray(content[_HEADER.size : words_end]), dtype=dtype)
    return torch.from_numpy(np.cumsum(gaps + 1) - 1), words
