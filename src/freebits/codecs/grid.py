"""Integers of a fixed number of bits, with a scale and a zero point per group of a row, as in most quantizers."""

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from freebits.codecs.bits import as_tensor, bytes_from, bytes_spec, pack_bits, unpack_bits
from freebits.codecs.code import Coded, Params
from freebits.types import FLOATS, TensorSpec

WORDS, SCALES, ZEROS = "words", "scales", "zeros"


class Grid:
    """One matrix `(integers - zero) * scale`."""

    exact = False

    def encode(self, tensors: Sequence[Tensor], makes: Sequence[TensorSpec]) -> Coded:  # noqa: ARG002
        """Encode integers and zero points, uint8 below `2^bits`; scales per group, float16; and `(bits, group)`."""
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
            raise ValueError(f"code grid cannot make {spec} with {bits!r} bits in groups of {group!r}")
        groups = (spec.shape[0], -(-spec.shape[1] // group))
        integers, zeros = (bytes_spec(_n_bytes(shape, bits)) for shape in (spec.shape, groups))
        return {WORDS: integers, SCALES: TensorSpec("F16", groups), ZEROS: zeros}


def _n_bytes(shape: tuple[int, ...], bits: int) -> int:
    return -(-prod(shape) * bits // 8)
