"""Numbers of eight bits beside scales: FP8 as DeepSeek, Qwen and Mistral publish it, MXFP8, and INT8."""

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from freebits.quantized_inputs.format import Settings, Stored, auxiliary, fp4, powers, spread
from freebits.types import TensorSpec

_CODES = ("F8_E4M3", "F8_E5M2", "I8")
_MX_BLOCK = 32


class Scaled:
    """A tensor of bytes, and one of scales: for the tensor, its rows, or blocks of it; of INT8 maybe zero points.

    Scales are floats, or the exponents of E8M0. DeepSeek V4 stores MXFP4 in the same way: two numbers in each byte of
    INT8, with a scale for each 32.
    """

    name = "FP8 or INT8 with scales"

    def found(self, name: str, specs: Mapping[str, TensorSpec], settings: Settings) -> Stored | None:
        """See `Format`."""
        spec = specs[name]
        stem = name.removesuffix("weight")
        scales = (f"{name}_scale_inv", f"{name}_scale", f"{stem}scale" if stem != name else "")
        scale = next((of for of in scales if of in specs), None)
        if spec.code not in _CODES or scale is None:
            return None
        parts = {"values": name, "scale": scale} | auxiliary(specs, {"zeros": f"{name}_zero_point"})
        if spec.code == "I8" and 2 * spec.shape[-1] == _MX_BLOCK * (specs[scale].shape or (1,))[-1]:
            return Stored(name, (*spec.shape[:-1], 2 * spec.shape[-1]), parts, _pairs)
        told = settings.get("weight_block_size")
        blocks = tuple(told) if isinstance(told, list | tuple) else None
        return Stored(name, spec.shape, parts, partial(_decoded, blocks=blocks))


def _decoded(parts: Mapping[str, Tensor], blocks: tuple[int, ...] | None) -> Tensor:
    values, shape = parts["values"].float(), tuple(parts["values"].shape)
    if "zeros" in parts:
        values -= spread(parts["zeros"].float(), shape, blocks)
    return values * spread(powers(parts["scale"]), shape, blocks)


def _pairs(parts: Mapping[str, Tensor]) -> Tensor:
    values = fp4(parts["values"])
    return values * spread(powers(parts["scale"]), tuple(values.shape))
