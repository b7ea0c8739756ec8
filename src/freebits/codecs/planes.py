"""Split values into byte planes. This separates exponents, which often repeat, from mantissas, which do not.

A *plane* has one byte of each value. The bits of a float with at least eight exponent bits are first rotated left by
one. The upper byte then contains only exponent bits, and the sign is next to the mantissa (as in ZipNN, Hershcovitch et
al. 2024).
"""

import numpy as np

from freebits.types import Bytes

_ROTATED = ("BF16", "F32", "F64")
_WIDTHS = {"F16": 2, "BF16": 2, "I16": 2, "U16": 2, "F32": 4, "I32": 4, "U32": 4, "F64": 8, "I64": 8, "U64": 8}


def n_planes(dtype_name: str) -> int:
    """Return the number of planes of a safetensors dtype: its bytes per value, or 1 if values are not split."""
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
    """Write the bytes of the values whose planes are `planes` to `out`, (n,); the inverse of `split`."""
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
