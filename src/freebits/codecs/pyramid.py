"""Groups of a row as points on a pyramid, with scales apart (pyramid vector quantisation, Fischer 1986)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from freebits.codecs import enumeration
from freebits.codecs.bits import as_tensor, bytes_from, bytes_kind, pack_bits, unpack_bits
from freebits.codecs.code import Coded, Params
from freebits.types import FLOATS, Kind

POINTS, SCALES, NORMS, LEVELS = "points", "scales", "norms", "levels"


class Pyramid:
    """One matrix: the direction of each group a point, its length a level times the length of the row."""

    exact = False

    def encode(self, tensors: Sequence[Tensor], makes: Sequence[Kind]) -> Coded:  # noqa: ARG002
        """Points (n, groups, N), int64; scales (n, groups), uint8; norms (n,) and levels (2^bits,), float16."""
        points, scales, norms, levels = tensors
        size, pulses = points.shape[2], int(points[0, 0].abs().sum())
        params = {"size": size, "pulses": pulses, "scale_bits": (len(levels) - 1).bit_length()}
        numbers = enumeration.rank(points.reshape(-1, size).numpy())
        indices = as_tensor(pack_bits(numbers, enumeration.n_bits(size, pulses)))
        packed = as_tensor(pack_bits(scales.flatten().long().numpy(), params["scale_bits"]))
        return Coded({POINTS: indices, SCALES: packed, NORMS: norms, LEVELS: levels}, params)

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[Kind], params: Params) -> list[Tensor]:
        """The matrix."""
        [kind], size, pulses = makes, params["size"], params["pulses"]
        n_groups = kind.numel // size
        read = [
            unpack_bits(bytes_from(parts[part], -(-n_groups * bits // 8)).tobytes(), n_groups, bits)
            for part, bits in ((POINTS, enumeration.n_bits(size, pulses)), (SCALES, params["scale_bits"]))
        ]
        points = torch.from_numpy(enumeration.unrank(read[0], size, pulses)).float()
        lengths = (
            parts[LEVELS].float()[torch.from_numpy(read[1])].view(kind.shape[0], -1) * parts[NORMS].float()[:, None]
        )
        directions = points / points.norm(dim=1, keepdim=True)
        return [(directions * lengths.view(-1, 1)).view(kind.shape).to(kind.dtype)]

    def parts(self, makes: Sequence[Kind], params: Params) -> dict[str, Kind]:
        """Bits, and the lengths of the rows."""
        [kind], (size, pulses, bits) = makes, (params[key] for key in ("size", "pulses", "scale_bits"))
        whole = all(type(value) is int and 1 <= value <= 256 for value in (size, pulses, bits)) and bits <= 8
        if not whole or kind.code not in FLOATS or len(kind.shape) != 2 or kind.shape[1] % size:
            raise ValueError(f"pyramids of {pulses!r} in {size!r} dimensions for {kind}")
        width = enumeration.n_bits(size, pulses)
        if width > 62:
            raise ValueError(f"points of {width} bits")
        n_groups = kind.numel // size
        points, scales = (bytes_kind(-(-n_groups * of // 8)) for of in (width, bits))
        norms, levels = Kind("F16", kind.shape[:1]), Kind("F16", (1 << bits,))
        return {POINTS: points, SCALES: scales, NORMS: norms, LEVELS: levels}
