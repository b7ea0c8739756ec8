"""Floats of four bits beside scales: MXFP4 as in gpt-oss, and NVFP4 in both dialects."""

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from freebits.quantized_inputs.format import Settings, Stored, fp4, powers, spread
from freebits.types import TensorSpec

_BLOCKS = "_blocks"
_PACKED = "_packed"


class StackedMXFP4:
    """Stacks of experts in blocks of 32 with a power of two each, which transformers has the other way round."""

    name = "MXFP4"

    def found(self, name: str, specs: Mapping[str, TensorSpec], settings: Settings) -> Stored | None:  # noqa: ARG002
        """See `Format`."""
        stem = name.removesuffix(_BLOCKS)
        scale = f"{stem}_scales"
        spec = specs[name]
        if (
            stem == name
            or spec.code != "U8"
            or specs.get(scale) != TensorSpec("U8", spec.shape[:-1])
            or len(spec.shape) != 4
        ):
            return None
        n, rows, blocks, size = spec.shape
        return Stored(stem, (n, 2 * size * blocks, rows), {"values": name, "scale": scale}, _stacked)


def _stacked(parts: Mapping[str, Tensor]) -> Tensor:
    values = fp4(parts["values"]) * powers(parts["scale"])[..., None]
    return values.flatten(-2).transpose(1, 2)


class FP4:
    """A matrix in blocks along its rows: of 16 with FP8 scales and one global scale (NVFP4), or of 32 (MXFP4).

    compressed-tensors divides by the global scale, ModelOpt multiplies by it.
    """

    name = "NVFP4 or MXFP4"

    def found(self, name: str, specs: Mapping[str, TensorSpec], settings: Settings) -> Stored | None:  # noqa: ARG002
        """See `Format`."""
        spec, stem = specs[name], name.removesuffix(_PACKED)
        scale = f"{stem}_scale"
        if spec.code != "U8" or len(spec.shape) < 2 or scale not in specs:
            return None
        of = specs[scale]
        shape = (*spec.shape[:-1], 2 * spec.shape[-1])
        if of.shape[:-1] != shape[:-1] or shape[-1] not in (16 * of.shape[-1], 32 * of.shape[-1]):
            return None
        parts = {"values": name, "scale": scale}
        divides, multiplies = f"{stem}_global_scale", f"{stem}_scale_2"
        if divides in specs:
            parts["global"] = divides
        elif multiplies in specs:
            parts["global"] = multiplies
        return Stored(stem, shape, parts, partial(_decoded, divides=divides in specs))


def _decoded(parts: Mapping[str, Tensor], divides: bool) -> Tensor:
    values = fp4(parts["values"])
    scale = powers(parts["scale"])
    if "global" in parts:
        whole = parts["global"].float()
        whole = (
            whole.reshape(*whole.shape, *[1] * (scale.ndim - whole.ndim)) if whole.numel() > 1 else whole.reshape(())
        )
        scale = scale / whole if divides else scale * whole
    return values * spread(scale, tuple(values.shape))
