"""Rows of bytes that consist of fields of several dtypes, such as the blocks of llama.cpp's formats."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from freebits.codecs.base import Coded, Params
from freebits.types import TensorSpec, bytes_of


class Columns:
    """One tensor of bytes (rows, size); part `i` is field `i` of each row, (rows, n), in the field's dtype.

    Params: `fields`, the dtype and `n` of each field, in the order in which their bytes fill a row.
    """

    exact = False

    def encode(self, tensors: Sequence[Tensor], makes: Sequence[TensorSpec]) -> Coded:  # noqa: ARG002
        """Return the parts as they are."""
        parts = {str(index): tensor for index, tensor in enumerate(tensors)}
        return Coded(parts, {"fields": [[TensorSpec.of(tensor).dtype_name, tensor.shape[1]] for tensor in tensors]})

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params) -> list[Tensor]:
        """Return the tensor."""
        [spec] = makes
        ordered = (parts[str(index)] for index in range(len(params["fields"])))
        rows = [bytes_of(part).reshape(spec.shape[0], -1) for part in ordered]
        return [torch.from_numpy(np.concatenate(rows, axis=1))]

    def parts(self, makes: Sequence[TensorSpec], params: Params) -> dict[str, TensorSpec]:
        """Return the spec of one part per field; the fields of a row take as many bytes as the tensor's row."""
        [spec] = makes
        if spec.dtype_name != "U8" or len(spec.shape) != 2 or not params["fields"]:
            raise ValueError(f"code columns cannot make {spec}: it needs fields and a matrix of bytes")
        n_rows, fields = spec.shape[0], params["fields"]
        parts = {str(index): TensorSpec(dtype_name, (n_rows, n)) for index, (dtype_name, n) in enumerate(fields)}
        specs = parts.values()
        if min(part.numel for part in specs) < 1 or sum(part.n_bytes for part in specs) != spec.n_bytes:
            raise ValueError(f"code columns cannot make {spec} from the fields {fields}")
        return parts


def fields_of(tensor: Tensor, fields: Sequence[tuple[str, int]]) -> list[Tensor]:
    """Split a tensor of bytes, (rows, size), into the parts that `Columns` stores."""
    data, offset, parts = bytes_of(tensor).reshape(tuple(tensor.shape)), 0, []
    for dtype_name, n in fields:
        size = TensorSpec(dtype_name, (n,)).n_bytes
        column = np.ascontiguousarray(data[:, offset : offset + size]).reshape(-1)
        parts.append(TensorSpec(dtype_name, (len(data), n)).view(column))
        offset += size
    return parts
