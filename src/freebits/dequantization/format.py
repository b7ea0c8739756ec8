"""The interface of input formats, and functions that several formats use."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from freebits.types import TensorSpec

Settings = Mapping[str, Any]
"""The `quantization_config` of a checkpoint."""


@dataclass(frozen=True)
class StoredMatrix:
    """A quantized matrix, or a stack of matrices, with the tensors in which a checkpoint stores it.

    Attributes:
        name: name of the matrix in a checkpoint that is not quantized.
        shape: shape of the matrix.
        parts: role, such as `scale` → name of the stored tensor with this role.
        decode: function that returns the matrix in float32, given role → stored tensor.
    """

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, str]
    decode: Callable[[Mapping[str, Tensor]], Tensor]


class Format(Protocol):
    """An input format."""

    def match(self, name: str, specs: Mapping[str, TensorSpec], settings: Settings) -> StoredMatrix | None:
        """Return the matrix whose quantized weights a tensor holds.

        Args:
            name: name of any tensor in the checkpoint.
            specs: name → spec of each tensor in the checkpoint.
            settings: `quantization_config` of the checkpoint.

        Returns:
            The matrix; None if the tensor does not hold quantized weights in this format.

        Raises:
            UnsupportedModelError: the tensor is in this format, but with settings that freebits does not read.
        """


def present_parts(specs: Mapping[str, TensorSpec], parts: Mapping[str, str]) -> dict[str, str]:
    """Return those parts, role → name, whose tensors are in the checkpoint."""
    return {role: name for role, name in parts.items() if name in specs}


def float_scales(scale: Tensor) -> Tensor:
    """Convert scales to float32. Scales stored as bytes are exponents in E8M0 (OCP Microscaling Formats, 5.4.1)."""
    return (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()


def expand_scales(scale: Tensor, shape: tuple[int, ...], blocks: tuple[int, ...] | None = None) -> Tensor:
    """Repeat the scale of each block so that the result broadcasts to `shape`.

    Args:
        scale: one scale, or one scale per block. A dimension of size 1 has one block.
        shape: shape of the tensor that the scales belong to.
        blocks: block sizes in the last dimensions. If a size does not fit the number of scales, the dimension is
            divided into equal blocks.

    Raises:
        ValueError: the number of scales does not fit the tensor.
    """
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.ndim < len(shape):
        scale = scale.reshape(*scale.shape, *[1] * (len(shape) - scale.ndim))
    for dim, size in enumerate(shape):
        n_scales = scale.shape[dim]
        given = (blocks or ())[dim - len(shape)] if len(shape) - dim <= len(blocks or ()) else 0
        block = given if given and -(-size // given) == n_scales else max(1, size // n_scales)
        if n_scales > 1 and -(-size // block) != n_scales:
            raise ValueError(f"{n_scales} scales do not fit {size} weights")
        if n_scales > 1:
            scale = scale.repeat_interleave(block, dim).narrow(dim, 0, size)
    return scale


_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_SIGNED_E2M1 = torch.cat([_E2M1, -_E2M1])


def unpack_fp4(packed: Tensor) -> Tensor:
    """Unpack 4-bit floats in E2M1, (…, n) bytes → (…, 2 n), float32 (OCP Microscaling Formats, 5.3.3)."""
    return _SIGNED_E2M1[_unpack_nibbles(packed).int()]


def _unpack_nibbles(packed: Tensor) -> Tensor:
    """Split each byte into two 4-bit values, lower bits first, (…, n) bytes → (…, 2 n), uint8."""
    raw = packed.view(torch.uint8)
    return torch.stack([raw & 15, raw >> 4], -1).flatten(-2)


def unpack_integers(packed: Tensor, bits: int, n: int) -> Tensor:
    """Unpack `n` unsigned integers from 32-bit values along the last dimension, lowest bits first, (…, n), int32."""
    shifts = torch.arange(0, 32 // bits * bits, bits)
    integers = (packed.long()[..., None] >> shifts) & (1 << bits) - 1
    return integers.flatten(-2)[..., :n].int()
