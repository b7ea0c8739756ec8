"""Predict how many bits integers will take, and choose the scale of each matrix so that all of them meet a target."""

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
    """Predicts the size of some matrices from the global scale `c`.

    The model counts the weights by their magnitude relative to their scale at `c = 1`. It assumes that weights of one
    magnitude are normally distributed, and includes the errors that error compensation adds.

    Attributes:
        counts: number of weights of each magnitude, in sixteenths of an octave.
    """

    def __init__(self, counts: NDArray[np.float64] | None = None) -> None:
        self.counts = np.zeros(len(_OCTAVES) * _PER_OCTAVE) if counts is None else counts

    @classmethod
    def of(cls, W: Tensor, rows: Tensor, columns: Tensor) -> "RateModel":
        """Return the model of one matrix (n, m), from its weights and its scales at `c = 1`."""
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
        """Return the model of several matrices together."""
        return sum(rate_models, cls())

    def bits(self, c: float) -> float:
        """Return the predicted bits of all integers."""
        logs = np.arange(len(self.counts)) / _PER_OCTAVE + _OCTAVES[0] - math.log2(c)
        return float(self.counts @ np.interp(logs, *_curve()))

    def c(self, bits: float) -> float:
        """Return the `c` at which the integers take this many bits, to a millionth of an octave."""
        low, high = -60.0, 40.0
        while high - low > 1e-6:
            middle = (low + high) / 2
            low, high = (middle, high) if self.bits(2**middle) > bits else (low, middle)
        return 2**high


@cache
def _curve() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return log2 of the standard deviation relative to the scale, and the entropy of the integers in bits."""
    logs = np.arange(-6, 12.25, 0.25)
    bits = []
    for log in logs:
        deviation = math.sqrt(4.0**log + 1 / 12)  # error compensation adds errors as large as those of rounding
        edges = torch.arange(-math.ceil(8 * deviation) - 1, math.ceil(8 * deviation) + 2, dtype=torch.float64) - 0.5
        masses = torch.special.ndtr(edges / deviation).diff().clamp_min(1e-300)
        bits.append(-(masses * masses.log2()).sum().item())
    bits[0] = 0.0
    lowest, highest = -100.0, 80.0
    return np.array([lowest, *logs, highest]), np.array([0.0, *bits, bits[-1] + highest - logs[-1]])


class RateController:
    """Spends bits on matrices in order, and corrects later matrices for the prediction errors of earlier ones.

    Args:
        rate_models: of the matrices, or groups of them.
        bits: for all of them.
    """

    def __init__(self, rate_models: list[RateModel], bits: float) -> None:
        self._remaining_models = list(rate_models)
        self._remaining_bits = bits
        self._spent_bits = self._predicted_bits = 0.0

    def next(self) -> float:
        """Return the `c` for the next matrix."""
        ratio = self._spent_bits / self._predicted_bits if self._predicted_bits else 1.0
        return RateModel.sum(self._remaining_models).c(self._remaining_bits / ratio)

    def spend(self, c: float, bits: float) -> float:
        """Record that the next matrix takes this many bits.

        Returns:
            0, or the excess in bits if the last matrix takes more than remains. Then nothing is recorded.
        """
        if len(self._remaining_models) == 1 and bits > self._remaining_bits:
            return bits - self._remaining_bits
        self._predicted_bits += self._remaining_models.pop(0).bits(c)
        self._spent_bits += bits
        self._remaining_bits -= bits
        return 0.0


class FixedRate:
    """Gives all matrices the same amount, whatever they take."""

    def __init__(self, amount: float) -> None:
        self._amount = amount

    def next(self) -> float:
        """Return the amount."""
        return self._amount

    def spend(self, amount: float, bits: float) -> float:  # noqa: ARG002
        """Return an excess of 0."""
        return 0.0
