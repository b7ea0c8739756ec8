"""Rows of bytes, split into fields of several dtypes. The blocks of llama.cpp's formats are such rows."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from freebits.codecs.base import Check, Coded, Params
from freebits.types import TensorSpec, bytes_of


class Columns:
    """One tensor of bytes (rows, size). Part `i` is field `i` of all rows, (rows, n), in the dtype of the field.

    Params: `fields`, a list with the dtype and `n` of each field, in the order of the fields in a row.
    """

    exact = False
    check = Check.DIGEST
    param_names = frozenset({"fields"})

    def encode(self, tensors: Sequence[Tensor], makes: Sequence[TensorSpec]) -> Coded:  # noqa: ARG002
        """Store the fields unchanged as parts."""
        parts = {str(index): tensor for index, tensor in enumerate(tensors)}
        return Coded(parts, {"fields": [[TensorSpec.of(tensor).dtype_name, tensor.shape[1]] for tensor in tensors]})

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params) -> list[Tensor]:
        """Return the tensor."""
        [spec] = makes
        ordered = (parts[str(index)] for index in range(len(params["fields"])))
        rows = [bytes_of(part).reshape(spec.shape[0], -1) for part in ordered]
        return [torch.from_numpy(np.concatenate(rows, axis=1))]

    def parts(self, makes: Sequence[TensorSpec], params: Params) -> dict[str, TensorSpec]:
        """Return the spec of each field. The fields of a row must together have the size of a row of the tensor."""
        [spec] = makes
        if spec.dtype_name != "U8" or len(spec.shape) != 2 or not params["fields"]:
            raise ValueError(
                f"the `columns` code needs one field or more and makes only matrices of bytes, but the tensor is {spec}"
            )
        n_rows, fields = spec.shape[0], params["fields"]
        parts = {str(index): TensorSpec(dtype_name, (n_rows, n)) for index, (dtype_name, n) in enumerate(fields)}
        specs = parts.values()
        if min(part.numel for part in specs) < 1 or sum(part.n_bytes for part in specs) != spec.n_bytes:
            raise ValueError(f"the fields {fields} do not fill the rows of {spec}")
        return parts


def fields_of(tensor: Tensor, fields: Sequence[tuple[str, int]]) -> list[Tensor]:
    """Split a tensor of bytes, (rows, size), into the parts that `Columns` stores.

    Args:
        tensor: the tensor.
        fields: dtype and number of values of each field of a row.
    """
    data, offset, parts = bytes_of(tensor).reshape(tuple(tensor.shape)), 0, []
    for dtype_name, n in fields:
        size = TensorSpec(dtype_name, (n,)).n_bytes
        column = np.ascontiguousarray(data[:, offset : offset + size]).reshape(-1)
        parts.append(TensorSpec(dtype_name, (len(data), n)).view(column))
        offset += size
    return parts
