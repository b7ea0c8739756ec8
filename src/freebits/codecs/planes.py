"""Numbers as byte planes: exponents, which repeat, apart from mantissas, which do not.

A float with eight exponent bits or more has its sign in the way: rotated left by one bit, its exponent fills the upper
byte and the sign joins the mantissa (as in ZipNN, Hershcovitch et al. 2024).
"""

import numpy as np

from freebits.types import Bytes

_ROTATED = ("BF16", "F32", "F64")
_WIDTHS = {"F16": 2, "BF16": 2, "I16": 2, "U16": 2, "F32": 4, "I32": 4, "U32": 4, "F64": 8, "I64": 8, "U64": 8}


def n_planes(code: str) -> int:
    """Bytes of a number of a safetensors dtype; one for a dtype that is narrower or not known."""
    return _WIDTHS.get(code, 1)


def split(data: Bytes, code: str) -> list[Bytes]:
    """The planes of little-endian numbers, the most significant first.

    Args:
        data: (n,), a whole number of numbers.
        code: their safetensors dtype.
    """
    width = n_planes(code)
    if width == 1:
        return [data]
    numbers = data.view(f"<u{width}")
    if code in _ROTATED:
        numbers = (numbers << 1) | (numbers >> (8 * width - 1))
    return [(numbers >> (8 * place)).astype(np.uint8) for place in reversed(range(width))]


def merge(planes: list[Bytes], code: str, out: Bytes) -> None:
    """Write the numbers of `planes` to `out`, the inverse of `split`."""
    width = n_planes(code)
    if width == 1:
        out[:] = planes[0]
        return
    numbers = out.view(f"<u{width}")
    numbers[:] = planes[0]
    for plane in planes[1:]:
        numbers *= 256  # in NumPy faster than a shift to the left
        numbers |= plane
    if code in _ROTATED:
        sign = numbers * numbers.dtype.type(1 << (8 * width - 1))
        numbers >>= 1
        numbers |= sign
