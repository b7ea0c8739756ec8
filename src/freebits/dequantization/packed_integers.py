"""Integers of 2, 4 or 8 bits packed in 32-bit values: compressed-tensors, GPTQ and AWQ."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from freebits.dequantization.format import Settings, StoredMatrix, expand_scales, present_parts, unpack_integers
from freebits.errors import UnsupportedModelError
from freebits.types import TensorSpec

_BITS = (2, 4, 8)


class CompressedIntegers:
    """The format `pack-quantized` of compressed-tensors.

    Integers are packed along the rows. By default, their zero point is `2^(bits - 1)`.
    """

    def match(self, name: str, specs: Mapping[str, TensorSpec], settings: Settings) -> StoredMatrix | None:
        """See `Format`."""
        stem = name.removesuffix("_packed")
        scale = f"{stem}_scale"
        if stem == name or specs[name].dtype_name != "I32" or scale not in specs:
            return None
        bits, group_size = _bits_and_group_size(settings)
        rows, n_packed = specs[name].shape
        width = n_packed * (32 // bits)
        n_grouped = group_size * specs[scale].shape[-1]
        if group_size and 0 <= width - n_grouped < 32 // bits:  # the last 32-bit value of a row may be only partly used
            width = n_grouped
        parts = {"values": name, "scale": scale}
        parts |= present_parts(specs, {"zeros": f"{stem}_zero_point", "groups": f"{stem}_g_idx"})
        return StoredMatrix(stem, (rows, width), parts, partial(_decode_compressed, bits=bits, shape=(rows, width)))


def _bits_and_group_size(settings: Settings) -> tuple[int, int]:
    """Return the bits and the group size in a config of compressed-tensors; size 0 if there are no groups."""
    groups: Any = settings.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    schemes = [group.get("weights") for group in groups if isinstance(group, dict)]
    pairs = {(scheme.get("num_bits"), scheme.get("group_size") or 0) for scheme in schemes if isinstance(scheme, dict)}
    if len(pairs) != 1:
        raise UnsupportedModelError(
            f"quantization_config has {len(pairs)} combinations of num_bits and group_size for weights, but freebits "
            "reads only checkpoints with exactly one: use the unquantized model"
        )
    [(bits, group_size)] = pairs
    return _checked_bits(bits), max(0, group_size)


def _checked_bits(bits: Any) -> int:
    if bits not in _BITS:
        raise UnsupportedModelError(
            f"the weights are packed integers of {bits} bits, but freebits reads 2, 4 or 8: use the unquantized model"
        )
    return int(bits)


def _decode_compressed(parts: Mapping[str, Tensor], bits: int, shape: tuple[int, int]) -> Tensor:
    values = unpack_integers(parts["values"], bits, shape[1]).float()
    zeros = torch.tensor(float(1 << bits - 1))
    if "zeros" in parts:  # zero points are packed along the other dimension
        scale = parts["scale"]
        zeros = unpack_integers(parts["zeros"].T.contiguous(), bits, scale.shape[0]).T.float()
    if "groups" in parts:
        group = parts["groups"].long()
        return (values - (zeros if zeros.ndim == 0 else zeros[:, group])) * parts["scale"].float()[:, group]
    return (values - expand_scales(zeros, shape)) * expand_scales(parts["scale"].float(), shape)


class GPTQ:
    """The format of GPTQ.

    Integers are packed along the inputs, and each input has a group index. Version 1 stores zero points minus 1.
    """

    def match(self, name: str, specs: Mapping[str, TensorSpec], settings: Settings) -> StoredMatrix | None:
        """See `Format`."""
        stem = name.removesuffix("qweight")
        if (
            stem == name
            or settings.get("quant_method") not in ("gptq", "auto-round")
            or specs[name].dtype_name != "I32"
        ):
            return None
        bits = _checked_bits(settings.get("bits"))
        n_packed, n_outputs = specs[name].shape
        shape = (n_outputs, n_packed * (32 // bits))
        parts = {"values": name, "scale": f"{stem}scales", "zeros": f"{stem}qzeros"}
        parts |= present_parts(specs, {"groups": f"{stem}g_idx"})
        offset = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
        decode = partial(_decode_gptq, bits=bits, shape=shape, offset=offset)
        return StoredMatrix(f"{stem}weight", shape, parts, decode)


def _decode_gptq(parts: Mapping[str, Tensor], bits: int, shape: tuple[int, int], offset: int) -> Tensor:
    values = unpack_integers(parts["values"].T.contiguous(), bits, shape[1]).T.float()
    scale = parts["scale"].float()
    zeros = unpack_integers(parts["zeros"], bits, shape[0]).float() + offset
    n_groups = len(scale)
    group = parts["groups"].long() if "groups" in parts else torch.arange(shape[1]) // (shape[1] // n_groups)
    return ((values - zeros[group]) * scale[group]).T


class AWQ:
    """The format of AWQ. Integers are packed along the outputs, and permuted within each 32-bit value."""

    _ORDER = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    """Position of each of the eight integers in a 32-bit value."""

    def match(self, name: str, specs: Mapping[str, TensorSpec], settings: Settings) -> StoredMatrix | None:
        """See `Format`."""
        stem = name.removesuffix("qweight")
        if stem == name or settings.get("quant_method") != "awq" or specs[name].dtype_name != "I32":
            return None
        if settings.get("bits", settings.get("w_bit")) != 4 or settings.get("version", "gemm").lower() != "gemm":
            raise UnsupportedModelError(
                "freebits reads AWQ weights only if they have 4 bits and version 'gemm': use the unquantized model"
            )
        n_inputs, n_packed = specs[name].shape
        parts = {"values": name, "scale": f"{stem}scales"} | present_parts(specs, {"zeros": f"{stem}qzeros"})
        return StoredMatrix(f"{stem}weight", (8 * n_packed, n_inputs), parts, self._decode)

    def _decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        scale = parts["scale"].float()
        values = self._unpack(parts["values"])
        zeros = self._unpack(parts["zeros"]) if "zeros" in parts else torch.full_like(scale, 8.0)
        group = torch.arange(len(values)) // (len(values) // len(scale))
        return ((values - zeros[group]) * scale[group]).T

    def _unpack(self, packed: Tensor) -> Tensor:
        integers = unpack_integers(packed, 4, 8 * packed.shape[-1])
        return integers.reshape(*packed.shape, 8)[..., self._ORDER].flatten(-2).float()
