"""The dtype, the shape and the bytes of a tensor."""

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from freebits.limits import TENSOR_VALUES

Bytes = NDArray[np.uint8]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BOOL": torch.bool,
}
"""Safetensors name of a dtype → PyTorch dtype. Tensors of other dtypes are handled as flat bytes."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CPU = torch.device("cpu")
"""The default device for linear algebra."""
HALF_DTYPES = ("F16", "BF16")
FLOATS = (*HALF_DTYPES, "F32", "F64")
_BITS = {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()} | {
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}


@dataclass(frozen=True)
class TensorSpec:
    """Dtype and shape of a tensor, written as `F16[456, 576]`. F16 is the safetensors name of the dtype float16.

    Raises:
        ValueError: the dtype is unknown, a size or the number of values is out of range, or the tensor does not have a
            whole number of bytes.
    """

    dtype_name: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        valid_sizes = all(type(size) is int and 0 <= size <= TENSOR_VALUES for size in self.shape)
        if self.dtype_name not in _BITS or not valid_sizes or self.numel > TENSOR_VALUES or self.numel * self.bits % 8:
            raise ValueError(f"{self} is not a valid dtype and shape")

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorSpec":
        """Return the spec of a tensor.

        Raises:
            KeyError: `DTYPES` lacks the dtype of the tensor.
        """
        return cls(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))

    @classmethod
    def parse(cls, text: str) -> "TensorSpec":
        """Parse a spec as `str` writes it.

        Raises:
            ValueError: the text is not a spec.
        """
        dtype_name, _, sizes = text.removesuffix("]").partition("[")
        spec = cls(dtype_name, tuple(int(size) for size in sizes.split(", ") if size))
        if str(spec) != text:
            raise ValueError(f"{text!r} is not a dtype and shape such as F16[456, 576]")
        return spec

    def __str__(self) -> str:
        return f"{self.dtype_name}{list(self.shape)}"

    @property
    def bits(self) -> int:
        """Bits per value."""
        return _BITS[self.dtype_name]

    @property
    def numel(self) -> int:
        """Number of values."""
        return prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Number of bytes."""
        return self.numel * self.bits // 8

    @property
    def dtype(self) -> torch.dtype:
        """The PyTorch dtype, or `uint8` if `DTYPES` lacks this dtype."""
        return DTYPES.get(self.dtype_name, torch.uint8)

    def view(self, data: Bytes) -> Tensor:
        """Return the tensor with these bytes, or flat bytes if `DTYPES` lacks the dtype.

        The tensor shares the memory of the bytes, unless they are read-only.
        """
        if self.dtype_name in DTYPES and not len(data):
            return torch.empty(self.shape, dtype=self.dtype)
        flat = torch.from_numpy(np.require(data, requirements="W"))
        return flat.view(self.dtype).reshape(self.shape) if self.dtype_name in DTYPES else flat


def bytes_of(tensor: Tensor) -> Bytes:
    """Return the bytes of a tensor, (n_bytes,), without a copy if the tensor is contiguous and on the CPU."""
    data: Bytes = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return data
