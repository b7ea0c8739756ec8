"""How many bits integers will take, before they are there."""

import math
from collections.abc import Iterable
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_PER_OCTAVE = 16
_OCTAVES = range(-40, 41)


class RateModel:
    """How the size of some matrices depends on `c`: their numbers, counted by how large they are in steps of `c = 1`.

    Numbers of one size are taken to be normal; the rounding errors fed back are counted in.

    Attributes:
        counts: of numbers, by sixteenths of octaves.
    """

    def __init__(self, counts: NDArray[np.float64] | None = None) -> None:
        self.counts = np.zeros(len(_OCTAVES) * _PER_OCTAVE) if counts is None else counts

    @classmethod
    def of(cls, W: Tensor, rows: Tensor, columns: Tensor) -> "RateModel":
        """Of one matrix (n, m), and its steps but for `c`."""
        squares = (W.float() / rows[:, None].float() / columns.float()).square_()
        columns = squares.mean(0).clamp_min_(1e-30)
        rows = (squares / columns).mean(1).clamp_min_(1e-30)
        logs = (rows[:, None] * columns).log2_().mul_(_PER_OCTAVE / 2).round_().long() - _OCTAVES[0] * _PER_OCTAVE
        size = len(_OCTAVES) * _PER_OCTAVE
        return cls(np.bincount(logs.clamp_(0, size - 1).flatten().numpy(), minlength=size).astype(np.float64))

    def __add__(self, other: "RateModel") -> "RateModel":
        return RateModel(self.counts + other.counts)

    @classmethod
    def sum(cls, rate_models: Iterable["RateModel"]) -> "RateModel":
        """Of all matrices."""
        return sum(rate_models, cls())

    def bits(self, c: float) -> float:
        """Bits of all integers."""
        logs = np.arange(len(self.counts)) / _PER_OCTAVE + _OCTAVES[0] - math.log2(c)
        return float(self.counts @ np.interp(logs, *_curve()))

    def c(self, bits: float) -> float:
        """The `c` at which they take so many bits, to a millionth; it grows as bits get fewer."""
        low, high = -60.0, 40.0
        while high - low > 1e-6:
            middle = (low + high) / 2
            low, high = (middle, high) if self.bits(2**middle) > bits else (low, middle)
        return 2**high


@cache
def _curve() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Log2 of a standard deviation in steps, and the entropy of what is rounded, in bits."""
    logs = np.arange(-6, 12.25, 0.25)
    bits = []
    for log in logs:
        deviation = math.sqrt(4.0**log + 1 / 12)  # with the errors that feedback adds, as large as those of rounding
        edges = torch.arange(-math.ceil(8 * deviation) - 1, math.ceil(8 * deviation) + 2, dtype=torch.float64) - 0.5
        masses = torch.special.ndtr(edges / deviation).diff().clamp_min(1e-300)
        bits.append(-(masses * masses.log2()).sum().item())
    bits[0] = 0.0
    far = np.array([-100.0]), np.array([80.0])
    return np.concatenate([far[0], logs, far[1]]), np.concatenate([[0.0], bits, [bits[-1] + 80 - logs[-1]]])


class RateController:
    """Spends bits on matrices in order, so that what one takes more or less is made up for by those that follow.

    Args:
        rate_models: of the matrices, or groups of them.
        bits: for all of them.
    """

    def __init__(self, rate_models: list[RateModel], bits: float) -> None:
        self._budgets = list(rate_models)
        self._left = bits
        self._taken = self._expected = 0.0

    def next(self) -> float:
        """The `c` for the first that is left."""
        ratio = self._taken / self._expected if self._expected else 1.0
        return RateModel.sum(self._budgets).c(self._left / ratio)

    def spend(self, c: float, bits: float) -> float:
        """How many bits they take too many; if none, they no longer count as left. The last may take what is left."""
        if len(self._budgets) == 1 and bits > self._left:
            return bits - self._left
        self._expected += self._budgets.pop(0).bits(c)
        self._taken += bits
        self._left -= bits
        return 0.0


class FixedRate:
    """The same for all matrices, whatever they take."""

    def __init__(self, amount: float) -> None:
        self._amount = amount

    def next(self) -> float:
        """The amount."""
        return self._amount

    def spend(self, amount: float, bits: float) -> float:  # noqa: ARG002
        """None too many."""
        return 0.0
