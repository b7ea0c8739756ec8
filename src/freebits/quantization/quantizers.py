"""The quantizers. To add one, add an entry to `QUANTIZERS`, and its name to `METHODS` in `freebits.options`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from freebits.codecs.base import Code, Coded
from freebits.codecs.integers import Integers
from freebits.codecs.registry import CODES
from freebits.options import INTEGERS, PYRAMID
from freebits.quantization.pyramids import round_to_pyramids
from freebits.quantization.scales import scaled_integers
from freebits.types import TensorSpec


@dataclass(frozen=True)
class Quantizer:
    """A way to round a matrix (n, m).

    Attributes:
        round: function that returns the tensors that the code encodes. Its arguments are: the matrix; the
            inverse-Hessian Cholesky factor of the matrix's inputs, (m, m), or None without calibration; the relative
            scales of the rows, (n,); the relative scales of the columns, (m,); the rate parameter (see `adaptive`); and
            the matrix to which the rounded matrix will be added, (n, m), or None.
        code: name of the code in `freebits.codecs.registry.CODES`.
        encoder: code object that encodes; None for the one in `CODES`.
        parts: names of the parts that the code stores.
        adaptive: whether the rate parameter is one factor that multiplies all scales. A rate controller chooses this
            factor, and several matrices are encoded together. Otherwise, the rate parameter is a number of bits per
            weight.
        whole_bits: whether the quantizer requires a whole number of bits per weight, from 2 to 8.
    """

    round: Callable[[Tensor, Tensor | None, Tensor, Tensor, float, Tensor | None], tuple[Tensor, ...]]
    code: str
    parts: tuple[str, ...]
    adaptive: bool = False
    whole_bits: bool = False
    encoder: Code | None = None

    def encode(self, tensors: Sequence[Tensor], specs: Sequence[TensorSpec]) -> Coded:
        """Encode the tensors that `round` returned for one or several matrices with these specs."""
        return (self.encoder or CODES[self.code]).encode(tensors, specs)


def _integers(
    W: Tensor,
    U: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    factor: float,
    base: Tensor | None = None,
    n_states: int = 0,
) -> tuple[Tensor, ...]:
    matrix = scaled_integers(W, U, rows, columns, factor, n_states, base)
    return matrix.integers, matrix.rows, matrix.columns


def _pyramids(
    W: Tensor, U: Tensor | None, _rows: Tensor, _columns: Tensor, bits: float, _base: Tensor | None = None
) -> tuple[Tensor, ...]:
    assert U is not None, "only calibrated matrices are rounded to pyramids"  # noqa: S101
    return round_to_pyramids(W, U, bits)


QUANTIZERS = {
    INTEGERS: Quantizer(_integers, "integers", ("message",), adaptive=True),
    PYRAMID: Quantizer(_pyramids, "pyramid", ("points", "scales", "norms", "levels")),
}
"""Method → quantizer."""


def with_trellis(n_states: int) -> Quantizer:
    """Return the quantizer `integers` with a trellis of `n_states` states; 0 for no trellis."""
    rounding = partial(_integers, n_states=n_states)
    return replace(QUANTIZERS[INTEGERS], round=rounding, encoder=Integers(n_states))
