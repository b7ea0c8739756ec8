"""Number the points of a pyramid `{y ∈ Zᴺ : Σ |y_i| = K}` (Fischer 1986), for many vectors at once.

The pyramid has `K` *pulses*. Vectors are ordered by their first coordinate, in the order 0, 1, -1, 2, -2, …, then by
their second coordinate, and so on. The pyramid of `n` dimensions and `k` pulses has `V(n, k)` points; `S(n, k)` is the
sum of `V(n, i)` for `i ≤ k`.

Fix the first coordinates of a vector. Let `n` be the number of coordinates after the next one, and let `k` pulses
remain for these `n + 1` coordinates. Of the vectors that begin in this way, `V(n, k) + 2 (S(n, k - 1) - S(n, k - a))`
precede those whose next coordinate is `a > 0`, and `V(n, k - a)` more precede those whose next coordinate is `-a`.
"""

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ranks = NDArray[Any]
"""An array of int64 or of Python integers."""


def rank(vectors: NDArray[np.int64]) -> Ranks:
    """Return the ranks, (n,), of vectors, (n, N), on the same pyramid.

    A rank is the index, from 0, of a vector in the order above. Ranks are Python integers if int64 is too small.
    """
    pulses = int(np.abs(vectors[:1]).sum())
    points, sums = _tables(vectors.shape[1], pulses)
    ranks: Ranks = np.zeros(len(vectors), points.dtype)
    remaining = np.full(len(vectors), pulses)
    for place, value in enumerate(vectors.T):
        n, size = vectors.shape[1] - 1 - place, np.abs(value)
        after = remaining - size
        before = points[n, remaining] + 2 * (sums[n, remaining - 1] - sums[n, after]) + (value < 0) * points[n, after]
        ranks += np.where(size > 0, before, 0)
        remaining = after
    return ranks


def unrank(ranks: Ranks, size: int, pulses: int) -> NDArray[np.int64]:
    """Return the vectors, (n, size), whose ranks are `ranks`, (n,); the inverse of `rank`.

    Raises:
        ValueError: a rank is out of range.
    """
    points, sums = _tables(size, pulses)
    ranks = ranks.astype(points.dtype)
    if len(ranks) and not (ranks.min() >= 0 and ranks.max() < points[size, pulses]):
        raise ValueError(f"a rank is out of range for the pyramid of {pulses} pulses in {size} dimensions")
    vectors = np.zeros((len(ranks), size), np.int64)
    remaining = np.full(len(ranks), pulses)
    for place in range(size):
        n = size - 1 - place
        low, high = np.zeros_like(remaining), remaining.copy()  # bisect for the largest `a` with `before <= rank`
        for _ in range(pulses.bit_length()):
            middle = (low + high + 1) // 2
            before = points[n, remaining] + 2 * (sums[n, remaining - 1] - sums[n, remaining - middle])
            fits = (middle > 0) & (before <= ranks)
            low, high = np.where(fits, middle, low), np.where(fits, high, np.maximum(middle - 1, low))
        after = remaining - low
        before = np.where(low > 0, points[n, remaining] + 2 * (sums[n, remaining - 1] - sums[n, after]), 0)
        ranks = ranks - before
        is_negative = (low > 0) & (ranks >= points[n, after])
        ranks = ranks - np.where(is_negative, points[n, after], 0)
        vectors[:, place] = np.where(is_negative, -low, low)
        remaining = after
    return vectors


def n_bits(size: int, pulses: int) -> int:
    """Return the number of bits that a rank on the pyramid of `pulses` pulses in `size` dimensions needs."""
    return int(_tables(size, pulses)[0][size, pulses] - 1).bit_length()


@cache
def _tables(size: int, pulses: int) -> tuple[Ranks, Ranks]:
    """Return `V(n, k)` and `S(n, k)`, (size + 1, pulses + 2). Their last column is 0, because `k = -1` reads it."""
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
