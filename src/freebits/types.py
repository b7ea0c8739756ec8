"""Dtype and shape of a tensor, and its bytes."""

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
"""The safetensors names of the dtypes that PyTorch computes with."""
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
CPU = torch.device("cpu")
"""Where tensors lie unless it is said."""
HALVES = ("F16", "BF16")
FLOATS = (*HALVES, "F32", "F64")
_BITS = {code: 8 * dtype.itemsize for code, dtype in DTYPES.items()} | {
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}


@dataclass(frozen=True)
class TensorSpec:
    """Dtype and shape of a tensor, written `F16[456, 576]`; the dtype by its safetensors name.

    Raises:
        ValueError: the dtype is not known, or a size makes no sense.
    """

    code: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        sizes = all(type(size) is int and 0 <= size <= TENSOR_VALUES for size in self.shape)
        if self.code not in _BITS or not sizes or prod(self.shape) > TENSOR_VALUES or prod(self.shape) * self.bits % 8:
            raise ValueError(f"no tensor is of the kind {self}")

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorSpec":
        """The kind of a tensor."""
        return cls(DTYPE_CODES[tensor.dtype], tuple(tensor.shape))

    @classmethod
    def parse(cls, text: str) -> "TensorSpec":
        """The inverse of `str`.

        Raises:
            ValueError: the text is none.
        """
        code, _, sizes = text.removesuffix("]").partition("[")
        spec = cls(code, tuple(int(size) for size in sizes.split(", ") if size))
        if str(spec) != text:
            raise ValueError(f"{text!r} is no dtype and shape")
        return spec

    def __str__(self) -> str:
        return f"{self.code}{list(self.shape)}"

    @property
    def bits(self) -> int:
        """Bits of a number."""
        return _BITS[self.code]

    @property
    def numel(self) -> int:
        """Numbers of the tensor."""
        return prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.numel * self.bits // 8

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in PyTorch; for one that PyTorch does not compute with `uint8`."""
        return DTYPES.get(self.code, torch.uint8)

    def view(self, data: Bytes) -> Tensor:
        """The tensor that has these bytes, not copied; flat bytes for a dtype that PyTorch does not compute with."""
        if self.code in DTYPES and not len(data):
            return torch.empty(self.shape, dtype=self.dtype)
        flat = torch.from_numpy(np.require(data, requirements="W"))
        return flat.view(self.dtype).reshape(self.shape) if self.code in DTYPES else flat


def bytes_of(tensor: Tensor) -> Bytes:
    """The bytes of a tensor, without copying where it is contiguous and on the CPU."""
    data: Bytes = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return data
