"""Number the points of a pyramid `{y ∈ Zᴺ : Σ |y_i| = K}` (Fischer 1986), all vectors at once.

Vectors go by their first coordinate, in the order 0, 1, -1, 2, -2, …, then by the next. With `V(n, k)` points on a
pyramid and their sums `S(n, k)` over pulses up to `k`, those before `±a` with `k` pulses left for it and `n`
coordinates after it number `V(n, k) + 2 (S(n, k - 1) - S(n, k - a))`, and another `V(n, k - a)` before `-a`.
"""

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Whole = NDArray[Any]
"""Of int64, or of Python's integers."""


def rank(vectors: NDArray[np.int64]) -> Whole:
    """The number of each vector (n, N) among those of its pyramid, (n,); Python's integers where 63 bits do not do."""
    pulses = int(np.abs(vectors[:1]).sum())
    points, sums = _tables(vectors.shape[1], pulses)
    numbers: Whole = np.zeros(len(vectors), points.dtype)
    left = np.full(len(vectors), pulses)
    for place, value in enumerate(vectors.T):
        n, size = vectors.shape[1] - 1 - place, np.abs(value)
        after = left - size
        before = points[n, left] + 2 * (sums[n, left - 1] - sums[n, after]) + (value < 0) * points[n, after]
        numbers += np.where(size > 0, before, 0)
        left = after
    return numbers


def unrank(numbers: Whole, size: int, pulses: int) -> NDArray[np.int64]:
    """The vectors of so many coordinates, (n, size), inverse of `rank`.

    Raises:
        ValueError: the pyramid has no such vector.
    """
    points, sums = _tables(size, pulses)
    numbers = numbers.astype(points.dtype)
    if len(numbers) and not (numbers.min() >= 0 and numbers.max() < points[size, pulses]):
        raise ValueError(f"no point on the pyramid of {pulses} in {size} dimensions")
    vectors = np.zeros((len(numbers), size), np.int64)
    left = np.full(len(numbers), pulses)
    for place in range(size):
        n = size - 1 - place
        low, high = np.zeros_like(left), left.copy()  # the largest `a` that does not go beyond the number
        for _ in range(pulses.bit_length()):
            middle = (low + high + 1) // 2
            before = points[n, left] + 2 * (sums[n, left - 1] - sums[n, left - middle])
            fits = (middle > 0) & (before <= numbers)
            low, high = np.where(fits, middle, low), np.where(fits, high, np.maximum(middle - 1, low))
        after = left - low
        before = np.where(low > 0, points[n, left] + 2 * (sums[n, left - 1] - sums[n, after]), 0)
        numbers = numbers - before
        negative = (low > 0) & (numbers >= points[n, after])
        numbers = numbers - np.where(negative, points[n, after], 0)
        vectors[:, place] = np.where(negative, -low, low)
        left = after
    return vectors


def n_bits(size: int, pulses: int) -> int:
    """Bits of a number."""
    return int(_tables(size, pulses)[0][size, pulses] - 1).bit_length()


@cache
def _tables(size: int, pulses: int) -> tuple[Whole, Whole]:
    """`V(n, k)` and `S(n, k)`, (size + 1, pulses + 2); the last column, at -1, is zero."""
    points = [[1] + [0] * pulses]
    for _ in range(size):
        row = [1]
        for k in range(1, pulses + 1):
            row.append(points[-1][k] + row[k - 1] + points[-1][k - 1])
        points.append(row)
    sums = [[sum(row[: k + 1]) for k in range(pulses + 1)] for row in points]
    dtype = np.int64 if 2 * max(map(max, sums)) < 2**63 else np.object_
    counts, totals = (np.array([[*row, 0] for row in table], dtype) for table in (points, sums))
    return counts, totals
