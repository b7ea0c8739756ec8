"""Split values into byte planes. This separates exponents, which often repeat, from mantissas, which do not.

A *plane* has one byte of each value. A float with at least eight exponent bits is first rotated left by one bit. The
exponent then fills the upper byte, and the sign joins the mantissa (as in ZipNN, Hershcovitch et al. 2024).
"""

import numpy as np

from freebits.types import Bytes

_ROTATED = ("BF16", "F32", "F64")
_WIDTHS = {"F16": 2, "BF16": 2, "I16": 2, "U16": 2, "F32": 4, "I32": 4, "U32": 4, "F64": 8, "I64": 8, "U64": 8}


def n_planes(dtype_name: str) -> int:
    """Return the bytes per value of a safetensors dtype, or 1 if the dtype is unknown or narrower than a byte."""
    return _WIDTHS.get(dtype_name, 1)


def split(data: Bytes, dtype_name: str) -> list[Bytes]:
    """Return the planes of little-endian values, the most significant first.

    Args:
        data: (n,), the bytes of complete values.
        dtype_name: the safetensors dtype of the values.
    """
    width = n_planes(dtype_name)
    if width == 1:
        return [data]
    values = data.view(f"<u{width}")
    if dtype_name in _ROTATED:
        values = (values << 1) | (values >> (8 * width - 1))
    return [(values >> (8 * place)).astype(np.uint8) for place in reversed(range(width))]


def merge(planes: list[Bytes], dtype_name: str, out: Bytes) -> None:
    """Write the values of `planes` to `out`; the inverse of `split`."""
    width = n_planes(dtype_name)
    if width == 1:
        out[:] = planes[0]
        return
    values = out.view(f"<u{width}")
    values[:] = planes[0]
    for plane in planes[1:]:
        values *= 256  # faster in NumPy than a shift to the left
        values |= plane
    if dtype_name in _ROTATED:
        sign = values * values.dtype.type(1 << (8 * width - 1))
        values >>= 1
        values |= sign
