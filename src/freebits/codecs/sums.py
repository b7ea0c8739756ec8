"""Sums of decoded values, which reveal wrong values. Unlike digests, sums tolerate differences in rounding."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

N_SUMS = 4
_TOLERANCE = 2.0**-10
_ROW = 4096
"""Number of values in each row into which `sums` arranges values."""
_ROWS_AT_ONCE = 8192
"""Number of rows that are converted to float64 at a time."""


def sums(values: Tensor) -> list[float]:
    """Return four signed sums of values, (n,).

    The values are arranged in rows of 4096, padded with zeros. In each sum, a value is multiplied by the signs that
    `_signs` gives its row and its column for this sum.
    """
    n_rows = -(-len(values) // _ROW)
    rows = torch.nn.functional.pad(values, (0, n_rows * _ROW - len(values))).reshape(n_rows, _ROW)
    row_sums = torch.cat([block.double() @ _signs(_ROW) for block in rows.split(_ROWS_AT_ONCE)])
    result: list[float] = (_signs(n_rows) * row_sums).sum(0).tolist()
    return result


def check_sums(values: Tensor, expected: Sequence[float]) -> None:
    """Check that values, (n,), have the expected sums.

    Raises:
        ValueError: a sum differs by more than `2^-10` times the norm of the values, or this norm is not finite.
    """
    tolerance = _TOLERANCE * torch.linalg.vector_norm(values, dtype=torch.float64).item()
    pairs = zip(sums(values), expected, strict=True)
    if not math.isfinite(tolerance) or not all(abs(actual - packed) <= tolerance for actual, packed in pairs):
        raise ValueError(
            "the decoded values do not add up to the packed sums: this machine decodes them differently, or they are "
            "damaged"
        )


def are_sums(value: object) -> bool:
    """Return whether a value from JSON is a list of four finite sums."""
    return (
        isinstance(value, list)
        and len(value) == N_SUMS
        and all(isinstance(number, float) and math.isfinite(number) for number in value)
    )


def _signs(count: int) -> Tensor:
    """Return the signs (1 or -1) of the indices `n = 0 … count - 1` in the sums `j = 0 … 3`, (count, 4), float64.

    A sign is -1 if bit `63 - j` of `n · 0x9E3779B97F4A7C15 mod 2^64` is 1.
    """
    hashed = np.arange(count, dtype=np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15)
    bits = hashed >> (63 - np.arange(N_SUMS, dtype=np.uint64)) & np.uint64(1)
    return torch.from_numpy(1 - 2 * bits.astype(np.float64))
