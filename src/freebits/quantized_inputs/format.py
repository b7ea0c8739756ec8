"""What a format is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from freebits.types import TensorSpec

Settings = Mapping[str, Any]
"""The `quantization_config` of a checkpoint."""


@dataclass(frozen=True)
class Stored:
    """How one matrix, or a stack of them, is stored.

    Attributes:
        name: of the matrix, as in a checkpoint that is not quantized.
        shape: of the matrix.
        parts: role → name of the tensor that has it.
        decode: makes the matrix of these tensors, by role, in float32.
    """

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, str]
    decode: Callable[[Mapping[str, Tensor]], Tensor]


class Format(Protocol):
    """One format."""

    @property
    def name(self) -> str:
        """Under which people know it."""

    def found(self, name: str, specs: Mapping[str, TensorSpec], settings: Settings) -> Stored | None:
        """How a matrix is stored whose quantized weights are in the tensor of that name; None if not in this format."""


def auxiliary(specs: Mapping[str, TensorSpec], parts: Mapping[str, str]) -> dict[str, str]:
    """Those of some tensors that are there, by role."""
    return {role: name for role, name in parts.items() if name in specs}


def powers(scale: Tensor) -> Tensor:
    """Scales in float32; bytes are the exponents of E8M0 (OCP Microscaling Formats, 5.4.1)."""
    return (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()


def spread(scale: Tensor, shape: tuple[int, ...], blocks: tuple[int, ...] | None = None) -> Tensor:
    """Scales of blocks of a tensor, as something that the tensor can be multiplied by.

    Args:
        scale: one number, or one for each block; a dimension of size 1 stands for all of the tensor's.
        shape: of the tensor.
        blocks: sizes of a block in the last dimensions; where they do not fit, blocks divide the dimension equally.

    Raises:
        ValueError: the blocks do not cover the tensor.
    """
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.ndim < len(shape):
        scale = scale.reshape(*scale.shape, *[1] * (len(shape) - scale.ndim))
    for at, size in enumerate(shape):
        n = scale.shape[at]
        told = (blocks or ())[at - len(shape)] if len(shape) - at <= len(blocks or ()) else 0
        block = told if told and -(-size // told) == n else size // n
        if n > 1 and -(-size // block) != n:
            raise ValueError(f"{n} scales for {size} weights")
        if n > 1:
            scale = scale.repeat_interleave(block, at).narrow(at, 0, size)
    return scale


def nibbles(packed: Tensor) -> Tensor:
    """Two numbers of each byte, the lower four bits first, (…, 2 n), uint8."""
    raw = packed.view(torch.uint8)
    return torch.stack([raw & 15, raw >> 4], -1).flatten(-2)


_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_SIGNED_E2M1 = torch.cat([_E2M1, -_E2M1])


def fp4(packed: Tensor) -> Tensor:
    """Floats of four bits, E2M1, two in each byte, (…, 2 n), float32 (OCP Microscaling Formats, 5.3.3)."""
    return _SIGNED_E2M1[nibbles(packed).int()]


def unpacked(words: Tensor, bits: int, n: int) -> Tensor:
    """Unsigned numbers of some bits from the last dimension of 32-bit words, the lowest bits first, (…, n), int32."""
    shifts = torch.arange(0, 32 // bits * bits, bits)
    numbers = (words.long()[..., None] >> shifts) & (1 << bits) - 1
    return numbers.flatten(-2)[..., :n].int()
