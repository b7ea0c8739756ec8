"""The ways to round a matrix. A new quantizer is one more entry in `QUANTIZERS`."""

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
        round: takes the matrix; the inverse-Hessian Cholesky factor of its inputs, (m, m), or None without calibration;
            scales of rows, (n,), and columns, (m,), by which errors cost the same everywhere; and the rate. Returns
            the tensors that the code encodes.
        code: the code's name in `freebits.codecs.registry.CODES`.
        parts: names of the parts that the code stores.
        adaptive: whether the rate is a common factor of all scales, which a rate controller chooses; several matrices
            are then encoded together. Otherwise the rate is a number of bits per weight.
        whole_bits: whether it rounds only to whole numbers of bits, from 2 to 8.
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
    assert U is not None, "pyramids are rounded with calibration only"  # noqa: S101
    return round_to_pyramids(W, U, bits)


QUANTIZERS = {
    INTEGERS: Quantizer(_integers, "integers", ("message",), adaptive=True),
    PYRAMID: Quantizer(_pyramids, "pyramid", ("points", "scales", "norms", "levels")),
}
"""Method → quantizer."""
