"""Groups of weights, each stored as a scale and a point on a pyramid (pyramid vector quantization, Fischer 1986)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from freebits.codecs import enumeration
from freebits.codecs.base import Check, Coded, Params
from freebits.codecs.bits import as_tensor, bytes_from, bytes_spec, pack_bits, unpack_bits
from freebits.types import FLOATS, TensorSpec

POINTS, SCALES, NORMS, LEVELS = "points", "scales", "norms", "levels"


class Pyramid:
    """One matrix, whose rows are split into groups.

    The direction of a group is the direction of its point. The length of a group is a level times the norm of the row.
    The scale of a group is the index of its level.

    Params: `size`, the number `N` of weights of a group; `pulses`, the pulses of the pyramid; `scale_bits`, the bits of
    a scale.
    """

    exact = False
    check = Check.DIGEST
    param_names = frozenset({"size", "pulses", "scale_bits"})

    def encode(self, tensors: Sequence[Tensor], makes: Sequence[TensorSpec]) -> Coded:  # noqa: ARG002
        """Encode points (n, groups, N), int64; scales (n, groups), uint8; norms (n,) and levels (2^bits,), float16."""
        points, scales, norms, levels = tensors
        size, pulses = points.shape[2], int(points[0, 0].abs().sum())
        params = {"size": size, "pulses": pulses, "scale_bits": (len(levels) - 1).bit_length()}
        ranks = enumeration.rank(points.reshape(-1, size).numpy())
        packed_points = as_tensor(pack_bits(ranks, enumeration.n_bits(size, pulses)))
        packed_scales = as_tensor(pack_bits(scales.flatten().long().numpy(), params["scale_bits"]))
        return Coded({POINTS: packed_points, SCALES: packed_scales, NORMS: norms, LEVELS: levels}, params)

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params) -> list[Tensor]:
        """Return the matrix."""
        [spec], size, pulses = makes, params["size"], params["pulses"]
        n_groups = spec.numel // size
        ranks, scales = (
            unpack_bits(bytes_from(parts[part], -(-n_groups * bits // 8)).tobytes(), n_groups, bits)
            for part, bits in ((POINTS, enumeration.n_bits(size, pulses)), (SCALES, params["scale_bits"]))
        )
        points = torch.from_numpy(enumeration.unrank(ranks, size, pulses)).float()
        levels = parts[LEVELS].float()[torch.from_numpy(scales)].view(spec.shape[0], -1)
        lengths = levels * parts[NORMS].float()[:, None]
        directions = points / points.norm(dim=1, keepdim=True)
        return [(directions * lengths.view(-1, 1)).view(spec.shape).to(spec.dtype)]

    def parts(self, makes: Sequence[TensorSpec], params: Params) -> dict[str, TensorSpec]:
        """Return the specs of the packed points and scales, of the norms, and of the levels."""
        [spec], (size, pulses, bits) = makes, (params[key] for key in ("size", "pulses", "scale_bits"))
        valid = all(type(value) is int and 1 <= value <= 256 for value in (size, pulses, bits)) and bits <= 8
        if not valid or spec.dtype_name not in FLOATS or len(spec.shape) != 2 or spec.shape[1] % size:
            raise ValueError(
                f"the `pyramid` code cannot make {spec} with {pulses!r} pulses, groups of {size!r} weights, and scales "
                f"of {bits!r} bits"
            )
        width = enumeration.n_bits(size, pulses)
        if width > 62:
            raise ValueError(f"points have {width} bits: at most 62 bits are allowed")
        n_groups = spec.numel // size
        points, scales = (bytes_spec(-(-n_groups * n_bits // 8)) for n_bits in (width, bits))
        norms, levels = TensorSpec("F16", spec.shape[:1]), TensorSpec("F16", (1 << bits,))
        return {POINTS: points, SCALES: scales, NORMS: norms, LEVELS: levels}
