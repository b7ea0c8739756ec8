"""Integers of a fixed number of bits, with a scale and a zero for each group of a row: as most quantizers have them."""

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
        """Integers and zeros, uint8 below `2^bits`; scales, float16, for each group; and `bits, group`."""
        integers, scales, zeros, form = tensors
        bits, group = form.tolist()
        words, packed = (as_tensor(pack_bits(of.flatten().long().numpy(), bits)) for of in (integers, zeros))
        return Coded({WORDS: words, SCALES: scales, ZEROS: packed}, {"bits": bits, "group": group})

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params) -> list[Tensor]:
        """The matrix."""
        [spec], bits, group = makes, params["bits"], params["group"]
        shapes = (spec.shape, tuple(parts[SCALES].shape))
        integers, zeros = (
            torch.from_numpy(unpack_bits(bytes_from(parts[part], _n_bytes(shape, bits)).tobytes(), prod(shape), bits))
            for part, shape in zip((WORDS, ZEROS), shapes, strict=True)
        )
        spread = [of.repeat_interleave(group, 1)[:, : spec.shape[1]] for of in (zeros.view(shapes[1]), parts[SCALES])]
        return [((integers.view(spec.shape) - spread[0]) * spread[1].float()).to(spec.dtype)]

    def parts(self, makes: Sequence[TensorSpec], params: Params) -> dict[str, TensorSpec]:
        """Bits, and a scale for each group."""
        [spec], bits, group = makes, params["bits"], params["group"]
        sound = type(bits) is type(group) is int and 1 <= bits <= 8 and group >= 1
        if not sound or spec.code not in FLOATS or len(spec.shape) != 2:
            raise ValueError(f"a grid of {bits!r} bits in groups of {group!r} for {spec}")
        groups = (spec.shape[0], -(-spec.shape[1] // group))
        words, zeros = (bytes_spec(_n_bytes(shape, bits)) for shape in (spec.shape, groups))
        return {WORDS: words, SCALES: TensorSpec("F16", groups), ZEROS: zeros}


def _n_bytes(shape: tuple[int, ...], bits: int) -> int:
    return -(-prod(shape) * bits // 8)
