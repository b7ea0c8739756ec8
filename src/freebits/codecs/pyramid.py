"""Groups of a row as points on a pyramid, with scales apart (pyramid vector quantization, Fischer 1986)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from freebits.codecs import enumeration
from freebits.codecs.bits import as_tensor, bytes_from, bytes_spec, pack_bits, unpack_bits
from freebits.codecs.code import Coded, Params
from freebits.types import FLOATS, TensorSpec

POINTS, SCALES, NORMS, LEVELS = "points", "scales", "norms", "levels"


class Pyramid:
    """One matrix: the direction of each group a point, its length a level times the length of the row."""

    exact = False

    def encode(self, tensors: Sequence[Tensor], makes: Sequence[TensorSpec]) -> Coded:  # noqa: ARG002
        """Points (n, groups, N), int64; scales (n, groups), uint8; norms (n,) and levels (2^bits,), float16."""
        points, scales, norms, levels = tensors
        size, pulses = points.shape[2], int(points[0, 0].abs().sum())
        params = {"size": size, "pulses": pulses, "scale_bits": (len(levels) - 1).bit_length()}
        numbers = enumeration.rank(points.reshape(-1, size).numpy())
        indices = as_tensor(pack_bits(numbers, enumeration.n_bits(size, pulses)))
        packed = as_tensor(pack_bits(scales.flatten().long().numpy(), params["scale_bits"]))
        return Coded({POINTS: indices, SCALES: packed, NORMS: norms, LEVELS: levels}, params)

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params) -> list[Tensor]:
        """The matrix."""
        [spec], size, pulses = makes, params["size"], params["pulses"]
        n_groups = spec.numel // size
        read = [
            unpack_bits(bytes_from(parts[part], -(-n_groups * bits // 8)).tobytes(), n_groups, bits)
            for part, bits in ((POINTS, enumeration.n_bits(size, pulses)), (SCALES, params["scale_bits"]))
        ]
        points = torch.from_numpy(enumeration.unrank(read[0], size, pulses)).float()
        lengths = (
            parts[LEVELS].float()[torch.from_numpy(read[1])].view(spec.shape[0], -1) * parts[NORMS].float()[:, None]
        )
        directions = points / points.norm(dim=1, keepdim=True)
        return [(directions * lengths.view(-1, 1)).view(spec.shape).to(spec.dtype)]

    def parts(self, makes: Sequence[TensorSpec], params: Params) -> dict[str, TensorSpec]:
        """Bits, and the lengths of the rows."""
        [spec], (size, pulses, bits) = makes, (params[key] for key in ("size", "pulses", "scale_bits"))
        whole = all(type(value) is int and 1 <= value <= 256 for value in (size, pulses, bits)) and bits <= 8
        if not whole or spec.code not in FLOATS or len(spec.shape) != 2 or spec.shape[1] % size:
            raise ValueError(f"pyramids of {pulses!r} in {size!r} dimensions for {spec}")
        width = enumeration.n_bits(size, pulses)
        if width > 62:
            raise ValueError(f"points of {width} bits")
        n_groups = spec.numel // size
        points, scales = (bytes_spec(-(-n_groups * of // 8)) for of in (width, bits))
        norms, levels = TensorSpec("F16", spec.shape[:1]), TensorSpec("F16", (1 << bits,))
        return {POINTS: points, SCALES: scales, NORMS: norms, LEVELS: levels}
