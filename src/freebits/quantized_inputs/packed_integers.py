"""Integers of few bits in 32-bit words: compressed-tensors, GPTQ and AWQ."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from freebits.errors import UnsupportedModelError
from freebits.quantized_inputs.format import Settings, Stored, auxiliary, spread, unpacked
from freebits.types import TensorSpec

_BITS = (2, 4, 8)


class CompressedIntegers:
    """compressed-tensors' `pack-quantized`: rows of words; what is added makes integers of either sign unsigned."""

    name = "compressed-tensors integers"

    def found(self, name: str, specs: Mapping[str, TensorSpec], settings: Settings) -> Stored | None:
        """See `Format`."""
        stem = name.removesuffix("_packed")
        scale = f"{stem}_scale"
        if stem == name or specs[name].code != "I32" or scale not in specs:
            return None
        bits, group = _weights_of(settings)
        rows, n_values = specs[name].shape
        width = n_values * (32 // bits)
        if group and 0 <= width - group * specs[scale].shape[-1] < 32 // bits:  # the last word may be half empty
            width = group * specs[scale].shape[-1]
        parts = {"values": name, "scale": scale}
        parts |= auxiliary(specs, {"zeros": f"{stem}_zero_point", "groups": f"{stem}_g_idx"})
        return Stored(stem, (rows, width), parts, partial(_compressed, bits=bits, shape=(rows, width)))


def _weights_of(settings: Settings) -> tuple[int, int]:
    """Bits and group size that a compressed-tensors config has for weights."""
    groups: Any = settings.get("config_groups")
    told = [of.get("weights") for of in groups.values() if isinstance(of, dict)] if isinstance(groups, dict) else []
    found = {(of.get("num_bits"), of.get("group_size") or 0) for of in told if isinstance(of, dict)}
    if len(found) != 1:
        raise UnsupportedModelError("its quantization_config has no one number of bits for all weights")
    [(bits, group)] = found
    return _checked(bits), max(0, group)


def _checked(bits: Any) -> int:
    if bits not in _BITS:
        raise UnsupportedModelError(f"weights of {bits} bits in 32-bit words are not read: those of 2, 4 and 8 are")
    return int(bits)


def _compressed(parts: Mapping[str, Tensor], bits: int, shape: tuple[int, int]) -> Tensor:
    values = unpacked(parts["values"], bits, shape[1]).float()
    zeros = torch.tensor(float(1 << bits - 1))
    if "zeros" in parts:  # packed along the rows
        scale = parts["scale"]
        zeros = unpacked(parts["zeros"].T.contiguous(), bits, scale.shape[0]).T.float()
    if "groups" in parts:
        at = parts["groups"].long()
        return (values - (zeros if zeros.ndim == 0 else zeros[:, at])) * parts["scale"].float()[:, at]
    return (values - spread(zeros, shape)) * spread(parts["scale"].float(), shape)


class GPTQ:
    """GPTQ's: words down the inputs, a group for each input; zero points less one, unless in its second format."""

    name = "GPTQ"

    def found(self, name: str, specs: Mapping[str, TensorSpec], settings: Settings) -> Stored | None:
        """See `Format`."""
        stem = name.removesuffix("qweight")
        if stem == name or settings.get("quant_method") not in ("gptq", "auto-round") or specs[name].code != "I32":
            return None
        bits = _checked(settings.get("bits"))
        n_values, n_outputs = specs[name].shape
        shape = (n_outputs, n_values * (32 // bits))
        parts = {"values": name, "scale": f"{stem}scales", "zeros": f"{stem}qzeros"}
        parts |= auxiliary(specs, {"groups": f"{stem}g_idx"})
        less = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
        return Stored(f"{stem}weight", shape, parts, partial(_gptq, bits=bits, shape=shape, less=less))


def _gptq(parts: Mapping[str, Tensor], bits: int, shape: tuple[int, int], less: int) -> Tensor:
    values = unpacked(parts["values"].T.contiguous(), bits, shape[1]).T.float()
    scale = parts["scale"].float()
    zeros = unpacked(parts["zeros"], bits, shape[0]).float() + less
    n_groups = len(scale)
    at = parts["groups"].long() if "groups" in parts else torch.arange(shape[1]) // (shape[1] // n_groups)
    return ((values - zeros[at]) * scale[at]).T


class AWQ:
    """AWQ's: words along the outputs, with eight numbers in an order of their own."""

    name = "AWQ"
    _ORDER = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    """Where each of eight numbers is in a word."""

    def found(self, name: str, specs: Mapping[str, TensorSpec], settings: Settings) -> Stored | None:
        """See `Format`."""
        stem = name.removesuffix("qweight")
        if stem == name or settings.get("quant_method") != "awq" or specs[name].code != "I32":
            return None
        if settings.get("bits", settings.get("w_bit")) != 4 or settings.get("version", "gemm").lower() != "gemm":
            raise UnsupportedModelError("AWQ weights are read in 4 bits and version 'gemm' alone")
        n_inputs, n_values = specs[name].shape
        parts = {"values": name, "scale": f"{stem}scales"} | auxiliary(specs, {"zeros": f"{stem}qzeros"})
        return Stored(f"{stem}weight", (8 * n_values, n_inputs), parts, self._decoded)

    def _decoded(self, parts: Mapping[str, Tensor]) -> Tensor:
        scale = parts["scale"].float()
        values = self._ordered(parts["values"])
        zeros = self._ordered(parts["zeros"]) if "zeros" in parts else torch.full_like(scale, 8.0)
        at = torch.arange(len(values)) // (len(values) // len(scale))
        return ((values - zeros[at]) * scale[at]).T

    def _ordered(self, words: Tensor) -> Tensor:
        numbers = unpacked(words, 4, 8 * words.shape[-1])
        return numbers.reshape(*words.shape, 8)[..., self._ORDER].flatten(-2).float()
