"""8-bit weights with scales: MXFP8, INT8, and FP8 as DeepSeek, Qwen and Mistral publish it."""

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from freebits.dequantization.format import (
    Settings,
    StoredMatrix,
    expand_scales,
    float_scales,
    present_parts,
    unpack_fp4,
)
from freebits.types import TensorSpec

_DTYPE_NAMES = ("F8_E4M3", "F8_E5M2", "I8")
_MX_BLOCK = 32


class Scaled:
    """8-bit weights with a scale for the tensor, for each row, or for each block. INT8 weights can have zero points.

    Scales are floats, or exponents in E8M0. Under the same tensor names, DeepSeek V4 stores MXFP4: each INT8 byte holds
    two weights, and each block of 32 weights has a scale.
    """

    def match(self, name: str, specs: Mapping[str, TensorSpec], settings: Settings) -> StoredMatrix | None:
        """See `Format`."""
        spec = specs[name]
        stem = name.removesuffix("weight")
        candidates = (f"{name}_scale_inv", f"{name}_scale", f"{stem}scale" if stem != name else "")
        scale = next((candidate for candidate in candidates if candidate in specs), None)
        if spec.dtype_name not in _DTYPE_NAMES or scale is None:
            return None
        parts = {"values": name, "scale": scale} | present_parts(specs, {"zeros": f"{name}_zero_point"})
        if spec.dtype_name == "I8" and 2 * spec.shape[-1] == _MX_BLOCK * (specs[scale].shape or (1,))[-1]:
            return StoredMatrix(name, (*spec.shape[:-1], 2 * spec.shape[-1]), parts, _decode_mxfp4)
        block_size = settings.get("weight_block_size")
        blocks = tuple(block_size) if isinstance(block_size, list | tuple) else None
        return StoredMatrix(name, spec.shape, parts, partial(_decode, blocks=blocks))


def _decode(parts: Mapping[str, Tensor], blocks: tuple[int, ...] | None) -> Tensor:
    values, shape = parts["values"].float(), tuple(parts["values"].shape)
    if "zeros" in parts:
        values -= expand_scales(parts["zeros"].float(), shape, blocks)
    return values * expand_scales(float_scales(parts["scale"]), shape, blocks)


def _decode_mxfp4(parts: Mapping[str, Tensor]) -> Tensor:
    values = unpack_fp4(parts["values"])
    return values * expand_scales(float_scales(parts["scale"]), tuple(values.shape))
