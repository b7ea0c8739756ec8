"""Rows of bytes made of fields of several dtypes, such as the blocks of llama.cpp's formats."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from freebits.codecs.code import Coded, Params
from freebits.types import Kind, bytes_of


class Columns:
    """One tensor of bytes (rows, size), of parts (rows, numbers) of any dtypes whose bytes stand beside each other.

    Params: `fields`, dtype and numbers in a row of each part.
    """

    exact = False

    def encode(self, tensors: Sequence[Tensor], makes: Sequence[Kind]) -> Coded:  # noqa: ARG002
        """The parts, as they are."""
        parts = {str(number): tensor for number, tensor in enumerate(tensors)}
        return Coded(parts, {"fields": [[Kind.of(tensor).code, tensor.shape[1]] for tensor in tensors]})

    def decode(self, parts: Mapping[str, Tensor], makes: Sequence[Kind], params: Params) -> list[Tensor]:
        """The tensor."""
        [kind] = makes
        ordered = (parts[str(number)] for number in range(len(params["fields"])))
        rows = [bytes_of(part).reshape(kind.shape[0], -1) for part in ordered]
        return [torch.from_numpy(np.concatenate(rows, axis=1))]

    def parts(self, makes: Sequence[Kind], params: Params) -> dict[str, Kind]:
        """Tensors with as many rows as the tensor, whose rows take as many bytes."""
        [kind] = makes
        if kind.code != "U8" or len(kind.shape) != 2 or not params["fields"]:
            raise ValueError(f"fields of {kind}")
        parts = {str(n): Kind(code, (kind.shape[0], size)) for n, (code, size) in enumerate(params["fields"])}
        if min(part.numel for part in parts.values()) < 1 or sum(of.n_bytes for of in parts.values()) != kind.n_bytes:
            raise ValueError(f"fields {params['fields']} of {kind}")
        return parts


def fields_of(tensor: Tensor, fields: Sequence[tuple[str, int]]) -> list[Tensor]:
    """The parts of a tensor of bytes, (rows, size)."""
    data, at, parts = bytes_of(tensor).reshape(tuple(tensor.shape)), 0, []
    for code, n in fields:
        size = Kind(code, (n,)).n_bytes
        column = np.ascontiguousarray(data[:, at : at + size]).reshape(-1)
        parts.append(Kind(code, (len(data), n)).view(column))
        at += size
    return parts
