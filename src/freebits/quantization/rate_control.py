"""Predict how many bits integers take, and choose scales so that all matrices together take a target number of bits."""

import math
from collections.abc import Iterable
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from freebits.codecs.integers import separate_variances

_PER_OCTAVE = 16
_OCTAVES = range(-40, 41)


class RateModel:
    """Predicts the size of some matrices from the global scale `c`, a factor of all scales.

    The rate model assumes that each weight is normally distributed. The standard deviation of a weight, relative to the
    weight's scale at `c = 1`, is estimated as a factor of the row times a factor of the column. The rate model counts
    the weights by this standard deviation. The prediction includes the errors that error compensation adds.

    Attributes:
        counts: number of weights per standard deviation; one entry covers a sixteenth of an octave (a factor of 2).
    """

    def __init__(self, counts: NDArray[np.float64] | None = None) -> None:
        self.counts = np.zeros(len(_OCTAVES) * _PER_OCTAVE) if counts is None else counts

    @classmethod
    def of(cls, W: Tensor, rows: Tensor, columns: Tensor) -> "RateModel":
        """Return the rate model of one matrix, (n, m), computed from its weights and its scales at `c = 1`."""
        squares = (W.float() / rows[:, None].float() / columns.float()).square_()
        rows, columns = separate_variances(squares, 1e-30)
        logs = (rows[:, None] * columns).log2_().mul_(_PER_OCTAVE / 2).round_().long() - _OCTAVES[0] * _PER_OCTAVE
        size = len(_OCTAVES) * _PER_OCTAVE
        return cls(np.bincount(logs.clamp_(0, size - 1).flatten().numpy(), minlength=size).astype(np.float64))

    def __add__(self, other: "RateModel") -> "RateModel":
        return RateModel(self.counts + other.counts)

    @classmethod
    def sum(cls, rate_models: Iterable["RateModel"]) -> "RateModel":
        """Return the rate model of several matrices together."""
        return sum(rate_models, cls())

    def bits(self, c: float) -> float:
        """Return the predicted number of bits of all integers at a global scale `c`."""
        logs = np.arange(len(self.counts)) / _PER_OCTAVE + _OCTAVES[0] - math.log2(c)
        return float(self.counts @ np.interp(logs, *_curve()))

    def c(self, bits: float) -> float:
        """Return the `c` at which the integers take `bits` bits in total, accurate to a millionth of an octave."""
        low, high = -60.0, 40.0
        while high - low > 1e-6:
            middle = (low + high) / 2
            low, high = (middle, high) if self.bits(2**middle) > bits else (low, middle)
        return 2**high


@cache
def _curve() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the points of a curve from standard deviation to entropy.

    The first array is log2 of the standard deviation relative to the scale. The second array is the entropy of an
    integer in bits.
    """
    logs = np.arange(-6, 12.25, 0.25)
    bits = []
    for log in logs:
        variance = 4.0**log + 1 / 12  # error compensation adds errors as large as the rounding errors
        deviation = math.sqrt(variance) / (1 + 1 / 12 / variance)  # see `freebits.quantization.scales`
        edges = torch.arange(-math.ceil(8 * deviation) - 1, math.ceil(8 * deviation) + 2, dtype=torch.float64) - 0.5
        masses = torch.special.ndtr(edges / deviation).diff().clamp_min(1e-300)
        bits.append(-(masses * masses.log2()).sum().item())
    bits[0] = 0.0
    lowest, highest = -100.0, 80.0
    return np.array([lowest, *logs, highest]), np.array([0.0, *bits, bits[-1] + highest - logs[-1]])


class RateController:
    """Chooses the global scale `c` of one matrix after another, so that all matrices together take a number of bits.

    The controller corrects each choice for the prediction errors of earlier matrices.

    Args:
        rate_models: rate models of the matrices, or of groups of matrices, in the order of rounding.
        bits: target number of bits for all matrices together.
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
        """Record that the next matrix was rounded with `c` and takes `bits` bits.

        Returns:
            0, except if the last matrix takes more bits than remain. Then the method returns the excess in bits and
            records nothing.
        """
        if len(self._remaining_models) == 1 and bits > self._remaining_bits:
            return bits - self._remaining_bits
        self._predicted_bits += self._remaining_models.pop(0).bits(c)
        self._spent_bits += bits
        self._remaining_bits -= bits
        return 0.0


class FixedRate:
    """Chooses the same rate parameter for all matrices. Has the methods of `RateController`."""

    def __init__(self, rate_parameter: float) -> None:
        self._rate_parameter = rate_parameter

    def next(self) -> float:
        """Return the rate parameter."""
        return self._rate_parameter

    def spend(self, rate_parameter: float, bits: float) -> float:  # noqa: ARG002
        """Record nothing, and return an excess of 0."""
        return 0.0
