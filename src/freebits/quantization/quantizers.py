"""The quantizers. To add a quantizer, add an entry to `QUANTIZERS`."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from freebits.options import INTEGERS, PYRAMID
from freebits.quantization.pyramids import round_to_pyramids
from freebits.quantization.scales import scaled_integers


@dataclass(frozen=True)
class Quantizer:
    """A way to round a matrix (n, m).

    Attributes:
        round: function that returns the tensors that the code encodes. Its arguments are the matrix, the
            inverse-Hessian Cholesky factor of the matrix's inputs, (m, m), or None without calibration, the relative
            scales of the rows, (n,), and of the columns, (m,), and the rate parameter (see `adaptive`).
        code: name of the code in `freebits.codecs.registry.CODES`.
        parts: names of the parts that the code stores.
        adaptive: whether the rate parameter is a common factor of all scales, which a rate controller chooses; several
            matrices are then encoded together. Otherwise the rate parameter is a number of bits per weight.
        whole_bits: whether the quantizer requires a whole number of bits per weight, from 2 to 8.
    """

    round: Callable[[Tensor, Tensor | None, Tensor, Tensor, float], tuple[Tensor, ...]]
    code: str
    parts: tuple[str, ...]
    adaptive: bool = False
    whole_bits: bool = False


def _integers(W: Tensor, U: Tensor | None, rows: Tensor, columns: Tensor, factor: float) -> tuple[Tensor, ...]:
    matrix = scaled_integers(W, U, rows, columns, factor)
    return matrix.integers, matrix.rows, matrix.columns


def _pyramids(W: Tensor, U: Tensor | None, _rows: Tensor, _columns: Tensor, bits: float) -> tuple[Tensor, ...]:
    assert U is not None, "only calibrated matrices are rounded to pyramids"  # noqa: S101
    return round_to_pyramids(W, U, bits)


QUANTIZERS = {
    INTEGERS: Quantizer(_integers, "integers", ("message",), adaptive=True),
    PYRAMID: Quantizer(_pyramids, "pyramid", ("points", "scales", "norms", "levels")),
}
"""Method → quantizer."""
