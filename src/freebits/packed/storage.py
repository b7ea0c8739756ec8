"""How tensors lie in a packed checkpoint: as they are, or entropy-coded as bytes; both with a digest."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
import xxhash
from torch import Tensor

from freebits.checkpoint import DTYPE_CODES, DTYPES, Checkpoint
from freebits.coding.bits import as_tensor
from freebits.entropy import compress, decompress
from freebits.entropy.planes import Bytes
from freebits.errors import CheckpointError

MOST = 2**40
"""More bytes or numbers than any tensor has."""


@dataclass(frozen=True)
class Kind:
    """Dtype and shape of a tensor, written `F16[456, 576]`."""

    code: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "Kind":
        """The kind of a tensor."""
        return cls(DTYPE_CODES[tensor.dtype], tuple(tensor.shape))

    @classmethod
    def parse(cls, text: str) -> "Kind":
        """The inverse of `str`.

        Raises:
            ValueError: the text is none.
        """
        code, bracket, sizes = text.removesuffix("]").partition("[")
        shape = tuple(int(size) for size in sizes.split(",") if size)
        if not (bracket and text.endswith("]") and all(0 <= size < MOST for size in shape)):
            raise ValueError(f"{text!r} is no dtype and shape")
        return cls(code, shape)

    def __str__(self) -> str:
        return f"{self.code}{list(self.shape)}"


@dataclass(frozen=True)
class Stored:
    """What is written for a tensor.

    Attributes:
        tensor: itself, or bytes that stand for it.
        digest: of the tensor.
        kind: of the tensor, where bytes stand for it.
    """

    tensor: Tensor
    digest: str
    kind: Kind | None


def store(tensor: Tensor, entropy: bool) -> Stored:
    """A tensor as it is written, entropy-coded if asked for and if that gains."""
    kind, data = Kind.of(tensor), bytes_of(tensor)
    coded = compress(data, kind.code) if entropy else None
    if coded is None:
        return Stored(tensor, digest(kind, data), None)
    return Stored(as_tensor(coded), digest(kind, data), kind)


class StoredTensors(Checkpoint):
    """The tensors of a packed folder, decoded where bytes stand for them.

    Args:
        path: the folder.
        coded: names of those tensors, with the kinds of what they stand for.
    """

    def __init__(self, path: str | os.PathLike[str], coded: Mapping[str, Kind]) -> None:
        super().__init__(path)
        self.coded = {name: kind for name, kind in coded.items() if name in self.files}
        for name, kind in self.coded.items():
            if kind.code not in DTYPES:
                raise CheckpointError(f"tensor {name} in {path} has dtype {kind.code}, which is not supported")
        self.shapes = self.shapes | {name: kind.shape for name, kind in self.coded.items()}
        self.dtypes = self.dtypes | {name: DTYPES[kind.code] for name, kind in self.coded.items()}

    def __getitem__(self, name: str) -> Tensor:
        """The tensor called `name`, decoded.

        Raises:
            ValueError: the bytes that stand for it are damaged.
        """
        stored = super().__getitem__(name)
        return restore(stored, self.coded[name]) if name in self.coded else stored


def restore(stored: Tensor, kind: Kind) -> Tensor:
    """The tensor of that kind that bytes stand for.

    Raises:
        ValueError: they are damaged.
    """
    dtype = DTYPES[kind.code]
    n_bytes = prod(kind.shape) * dtype.itemsize
    data = decompress(bytes_of(stored), kind.code, n_bytes)
    return torch.from_numpy(data).view(dtype).reshape(kind.shape)


def bytes_of(tensor: Tensor) -> Bytes:
    """The bytes of a tensor, without copying where it is contiguous."""
    data: Bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return data


def digest(kind: Kind, data: Bytes) -> str:
    """XXH3-128 over the kind and the bytes of a tensor, 32 hexadecimal digits."""
    code = xxhash.xxh3_128(str(kind).encode())
    code.update(data.data)
    return code.hexdigest()
