"""Rows of bytes made of fields of several dtypes, such as the blocks of llama.cpp's formats."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from freebits.codecs.code import Coded, Params
from freebits.types import TensorSpec, bytes_of


class Columns:
    """One tensor of bytes (rows, size), of parts (rows, numbers) of any dtypes whose bytes stand beside each other.

    Params: `fields`, dtype and numbers in a row of each part.
    """

    exact = False

    def encode(self, tensors: Sequence[Tensor], makes: Sequence[TensorSpec]) -> Coded:  # noqa: ARG002
        """The parts, as they are."""
        parts = {str(number): tensor for number, tensor in enumerate(tensors)}
        return Coded(parts, {"fields": [[TensorSpec.of(tensor).code, tensor.shape[1]] for tensor in tensors]})

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[TensorSpec], params: Params) -> list[Tensor]:
        """The tensor."""
        [spec] = makes
        ordered = (parts[str(number)] for number in range(len(params["fields"])))
        rows = [bytes_of(part).reshape(spec.shape[0], -1) for part in ordered]
        return [torch.from_numpy(np.concatenate(rows, axis=1))]

    def parts(self, makes: Sequence[TensorSpec], params: Params) -> dict[str, TensorSpec]:
        """Tensors with as many rows as the tensor, whose rows take as many bytes."""
        [spec] = makes
        if spec.code != "U8" or len(spec.shape) != 2 or not params["fields"]:
            raise ValueError(f"fields of {spec}")
        parts = {str(n): TensorSpec(code, (spec.shape[0], size)) for n, (code, size) in enumerate(params["fields"])}
        if min(part.numel for part in parts.values()) < 1 or sum(of.n_bytes for of in parts.values()) != spec.n_bytes:
            raise ValueError(f"fields {params['fields']} of {spec}")
        return parts


def fields_of(tensor: Tensor, fields: Sequence[tuple[str, int]]) -> list[Tensor]:
    """The parts of a tensor of bytes, (rows, size)."""
    data, at, parts = bytes_of(tensor).reshape(tuple(tensor.shape)), 0, []
    for code, n in fields:
        size = TensorSpec(code, (n,)).n_bytes
        column = np.ascontiguousarray(data[:, at : at + size]).reshape(-1)
        parts.append(TensorSpec(code, (len(data), n)).view(column))
        at += size
    return parts
