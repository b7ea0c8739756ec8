"""4-bit floats with scales: MXFP4, and NVFP4 as compressed-tensors and ModelOpt write it."""

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from freebits.dequantization.format import Settings, StoredMatrix, expand_scales, float_scales, unpack_fp4
from freebits.types import TensorSpec


class StackedMXFP4:
    """The format of gpt-oss: stacks of expert matrices in MXFP4.

    Each block of 32 weights has a power of two as its scale. Decoding transposes each matrix to the layout of
    transformers.
    """

    def match(self, name: str, specs: Mapping[str, TensorSpec], settings: Settings) -> StoredMatrix | None:  # noqa: ARG002
        """See `Format`."""
        stem = name.removesuffix("_blocks")
        scale = f"{stem}_scales"
        spec = specs[name]
        if (
            stem == name
            or spec.dtype_name != "U8"
            or specs.get(scale) != TensorSpec("U8", spec.shape[:-1])
            or len(spec.shape) != 4
        ):
            return None
        n, rows, blocks, size = spec.shape
        return StoredMatrix(stem, (n, 2 * size * blocks, rows), {"values": name, "scale": scale}, _decode_stack)


def _decode_stack(parts: Mapping[str, Tensor]) -> Tensor:
    values = unpack_fp4(parts["values"]) * float_scales(parts["scale"])[..., None]
    return values.flatten(-2).transpose(1, 2)


class FP4:
    """NVFP4 (blocks of 16 weights along the rows, FP8 scales, and a global scale) or MXFP4 (blocks of 32 weights).

    Decoding divides by the global scale of compressed-tensors, but multiplies by the global scale of ModelOpt.
    """

    def match(self, name: str, specs: Mapping[str, TensorSpec], settings: Settings) -> StoredMatrix | None:  # noqa: ARG002
        """See `Format`."""
        spec, stem = specs[name], name.removesuffix("_packed")
        scale = f"{stem}_scale"
        if spec.dtype_name != "U8" or len(spec.shape) < 2 or scale not in specs:
            return None
        scale_shape = specs[scale].shape
        shape = (*spec.shape[:-1], 2 * spec.shape[-1])
        if scale_shape[:-1] != shape[:-1] or shape[-1] not in (16 * scale_shape[-1], 32 * scale_shape[-1]):
            return None
        parts = {"values": name, "scale": scale}
        divisor, multiplier = f"{stem}_global_scale", f"{stem}_scale_2"
        if divisor in specs:
            parts["global"] = divisor
        elif multiplier in specs:
            parts["global"] = multiplier
        return StoredMatrix(stem, shape, parts, partial(_decode, divide=divisor in specs))


def _decode(parts: Mapping[str, Tensor], divide: bool) -> Tensor:
    values = unpack_fp4(parts["values"])
    scale = float_scales(parts["scale"])
    if "global" in parts:
        factor = parts["global"].float()
        ones = [1] * (scale.ndim - factor.ndim)
        factor = factor.reshape(*factor.shape, *ones) if factor.numel() > 1 else factor.reshape(())
        scale = scale / factor if divide else scale * factor
    return values * expand_scales(scale, tuple(values.shape))
