"""Integers of a fixed number of bits, with a scale and a zero for each group of a row: as most quantisers have them."""

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from freebits.codecs.bits import as_tensor, bytes_from, bytes_kind, pack_bits, unpack_bits
from freebits.codecs.code import Coded, Params
from freebits.types import FLOATS, Kind

WORDS, SCALES, ZEROS = "words", "scales", "zeros"


class Grid:
    """One matrix `(integers - zero) * scale`."""

    exact = False

    def encode(self, tensors: Sequence[Tensor], makes: Sequence[Kind]) -> Coded:  # noqa: ARG002
        """Integers and zeros, uint8 below `2^bits`; scales, float16, for each group; and `bits, group`."""
        integers, scales, zeros, form = tensors
        bits, group = form.tolist()
        words, packed = (as_tensor(pack_bits(of.flatten().long().numpy(), bits)) for of in (integers, zeros))
        return Coded({WORDS: words, SCALES: scales, ZEROS: packed}, {"bits": bits, "group": group})

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[Kind], params: Params) -> list[Tensor]:
        """The matrix."""
        [kind], bits, group = makes, params["bits"], params["group"]
        shapes = (kind.shape, tuple(parts[SCALES].shape))
        integers, zeros = (
            torch.from_numpy(unpack_bits(bytes_from(parts[part], _n_bytes(shape, bits)).tobytes(), prod(shape), bits))
            for part, shape in zip((WORDS, ZEROS), shapes, strict=True)
        )
        spread = [of.repeat_interleave(group, 1)[:, : kind.shape[1]] for of in (zeros.view(shapes[1]), parts[SCALES])]
        return [((integers.view(kind.shape) - spread[0]) * spread[1].float()).to(kind.dtype)]

    def parts(self, makes: Sequence[Kind], params: Params) -> dict[str, Kind]:
        """Bits, and a scale for each group."""
        [kind], bits, group = makes, params["bits"], params["group"]
        sound = type(bits) is type(group) is int and 1 <= bits <= 8 and group >= 1
        if not sound or kind.code not in FLOATS or len(kind.shape) != 2:
            raise ValueError(f"a grid of {bits!r} bits in groups of {group!r} for {kind}")
        groups = (kind.shape[0], -(-kind.shape[1] // group))
        words, zeros = (bytes_kind(_n_bytes(shape, bits)) for shape in (kind.shape, groups))
        return {WORDS: words, SCALES: Kind("F16", groups), ZEROS: zeros}


def _n_bytes(shape: tuple[int, ...], bits: int) -> int:
    return -(-prod(shape) * bits // 8)
