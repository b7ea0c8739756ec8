"""GPTQ and rounding to nearest, with whole bits per weight and groups of 64 weights, to compare with freebits.

Importing this module registers the methods `gptq` and `rtn`, and the code `grid`, which stores their results.
"""

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from freebits.codecs.base import Check, Coded, Params
from freebits.codecs.bits import as_tensor, bytes_from, bytes_spec, pack_bits, unpack_bits
from freebits.codecs.registry import CODES
from freebits.quantization.error_compensation import compensated_rounding
from freebits.quantization.quantizers import QUANTIZERS, Quantizer
from freebits.types import FLOATS, TensorSpec

WORDS, SCALES, ZEROS = "words", "scales", "zeros"


class Grid:
    """One matrix, `(integers - zero) * scale`. Each group of a row has its own zero point and scale."""

    exact = False
    check = Check.DIGEST
    param_names = frozenset({"bits", "group"})

    def encode(self, tensors: Sequence[Tensor], makes: Sequence[TensorSpec]) -> Coded:  # noqa: ARG002
        """Encode four tensors: integers, scales of the groups, zero points of the groups, and `(bits, group)`.

        Integers and zero points are uint8 and less than `2^bits`; scales are float16; `group` is the size of a group.
        """
        integers, scales, zeros, bits_and_group = tensors
        bits, group = bits_and_group.tolist()
        packed_integers, packed_zeros = (
            as_tensor(pack_bits(values.flatten().long().numpy(), bits)) for values in (integers, zeros)
        )
        return Coded({WORDS: packed_integers, SCALES: scales, ZEROS: packed_zeros}, {"bits": bits, "group": group})

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params) -> list[Tensor]:
        """Return the matrix."""
        [spec], bits, group = makes, params["bits"], params["group"]
        scales = parts[SCALES]
        shapes = (spec.shape, tuple(scales.shape))
        integers, zeros = (
            torch.from_numpy(unpack_bits(bytes_from(parts[part], _n_bytes(shape, bits)).tobytes(), prod(shape), bits))
            for part, shape in zip((WORDS, ZEROS), shapes, strict=True)
        )
        zero, scale = (
            per_group.repeat_interleave(group, 1)[:, : spec.shape[1]] for per_group in (zeros.view(shapes[1]), scales)
        )
        return [((integers.view(spec.shape) - zero) * scale.float()).to(spec.dtype)]

    def parts(self, makes: Sequence[TensorSpec], params: Params) -> dict[str, TensorSpec]:
        """Return the specs of the packed integers, of the scales, and of the packed zero points."""
        [spec], bits, group = makes, params["bits"], params["group"]
        valid = type(bits) is type(group) is int and 1 <= bits <= 8 and group >= 1
        if not valid or spec.dtype_name not in FLOATS or len(spec.shape) != 2:
            raise ValueError(f"code grid cannot make {spec} with {bits!r} bits per weight and groups of size {group!r}")
        groups = (spec.shape[0], -(-spec.shape[1] // group))
        integers, zeros = (bytes_spec(_n_bytes(shape, bits)) for shape in (spec.shape, groups))
        return {WORDS: integers, SCALES: TensorSpec("F16", groups), ZEROS: zeros}


def _n_bytes(shape: tuple[int, ...], bits: int) -> int:
    return -(-prod(shape) * bits // 8)


GROUP = 64


def round_to_grid(W: Tensor, U: Tensor | None, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round a matrix (n, m), and return integers, (n, m), scales and zero points, (n, groups); see `Grid`.

    Args:
        W: the matrix.
        U: the inverse-Hessian Cholesky factor, see `inverse_factor`; None to round without error compensation.
        bits: the number of bits per integer.
    """
    max_integer = 2**bits - 1
    groups = W.float().split(GROUP, 1)
    lows = torch.stack([group.amin(1).clamp_max(0) for group in groups], 1)
    highs = torch.stack([group.amax(1).clamp_min(0) for group in groups], 1)
    scales = ((highs - lows) / max_integer).clamp_min(2.0**-24).half()
    zeros = (-lows / scales.float()).round().clamp(0, max_integer)

    def round_columns(weights: Tensor, first: int) -> Tensor:
        scale, zero = scales[:, first // GROUP, None].float(), zeros[:, first // GROUP, None]
        return ((weights / scale + zero).round().clamp(0, max_integer) - zero) * scale

    if U is None:
        rounded = torch.cat([round_columns(group, number * GROUP) for number, group in enumerate(groups)], 1)
    else:
        rounded = compensated_rounding(W, U, round_columns)
    column_scales, column_zeros = (
        values.repeat_interleave(GROUP, 1)[:, : W.shape[1]] for values in (scales.float(), zeros)
    )
    return (rounded / column_scales + column_zeros).round().to(torch.uint8), scales, zeros.to(torch.uint8)


def _gptq(
    W: Tensor, U: Tensor | None, _rows: Tensor, _columns: Tensor, bits: float, _base: Tensor | None = None
) -> tuple[Tensor, ...]:
    return *round_to_grid(W, U, int(bits)), torch.tensor([int(bits), GROUP])


def _nearest(
    W: Tensor, _U: Tensor | None, _rows: Tensor, _columns: Tensor, bits: float, _base: Tensor | None = None
) -> tuple[Tensor, ...]:
    return *round_to_grid(W, None, int(bits)), torch.tensor([int(bits), GROUP])


CODES["grid"] = Grid()
QUANTIZERS["gptq"] = Quantizer(_gptq, "grid", (WORDS, SCALES, ZEROS), whole_bits=True)
QUANTIZERS["rtn"] = Quantizer(_nearest, "grid", (WORDS, SCALES, ZEROS), whole_bits=True)
