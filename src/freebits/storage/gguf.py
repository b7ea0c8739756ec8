"""GGUF files: where their tensors lie, so that each can be coded by what it holds. Nothing of them is interpreted.

The format is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

import json
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import NamedTuple

from freebits.errors import CheckpointError
from freebits.storage.folder import CONFIG, GGUF, write_json
from freebits.storage.remote import Readable
from freebits.storage.weights import Entry, WeightsFile
from freebits.types import TensorSpec

Fields = tuple[tuple[str, int], ...]
"""What a block is made of: dtype, and how many numbers of it."""
_FLOATS = {0: "F32", 1: "F16", 30: "BF16", 28: "F64", 24: "I8", 25: "I16", 26: "I32", 27: "I64"}
_HALF, _HALVES = ("F16", 1), (("F16", 1), ("F16", 1))
_BLOCKS: dict[int, tuple[int, Fields]] = {
    2: (32, (_HALF, ("U8", 16))),  # Q4_0
    3: (32, (*_HALVES, ("U8", 16))),  # Q4_1
    6: (32, (_HALF, ("U8", 4), ("U8", 16))),  # Q5_0
    7: (32, (*_HALVES, ("U8", 4), ("U8", 16))),  # Q5_1
    8: (32, (_HALF, ("U8", 32))),  # Q8_0
    10: (256, (("U8", 16), ("U8", 64), *_HALVES)),  # Q2_K
    11: (256, (("U8", 32), ("U8", 64), ("U8", 12), _HALF)),  # Q3_K
    12: (256, (*_HALVES, ("U8", 12), ("U8", 128))),  # Q4_K
    13: (256, (*_HALVES, ("U8", 12), ("U8", 32), ("U8", 128))),  # Q5_K
    14: (256, (("U8", 128), ("U8", 64), ("U8", 16), _HALF)),  # Q6_K
    39: (32, (("U8", 1), ("U8", 16))),  # MXFP4
}
"""Number of a type → weights in a block, and its fields. Blocks of other types are bytes."""
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Number of a type of metadata → bytes."""
_TEXT, _ARRAY = 8, 9
_AHEAD = 1 << 20
_MOST = 1 << 24
"""Entries that an array of metadata, or the list of tensors, has at most."""


class GgufFile(WeightsFile):
    """A GGUF file, seen as tensors one after another that are all of its bytes; tensors are read when asked for.

    Attributes:
        header: what a safetensors file of these tensors would begin with.
        entries: name → tensor, in the order of their bytes; what lies between tensors is called `gguf.0` and so on.
        fields: name of a tensor of blocks → what a block is made of.

    Raises:
        CheckpointError: the file is missing, or is no sound GGUF file.
    """

    def _parse(self, file: Readable) -> None:
        reader = _Reader(file)
        tensors = sorted(reader.tensors(), key=lambda tensor: tensor.begin)
        at = 0
        self.fields: dict[str, Fields] = {}
        listed: dict[str, tuple[TensorSpec, int]] = {}
        for number, tensor in enumerate([*tensors, None]):
            begin = file.size if tensor is None else tensor.begin
            if begin < at:
                raise ValueError("tensors that overlap, or lie outside of the file")
            if begin > at:
                listed[f"gguf.{number}"] = TensorSpec("U8", (begin - at,)), at
            if tensor is not None:
                end = tensors[number + 1].begin if number + 1 < len(tensors) else file.size
                spec, fields = tensor.spec(end - begin)
                listed[tensor.name] = spec, begin
                self.fields |= {tensor.name: fields} if fields else {}
                at = begin + spec.n_bytes
        told = {
            name: {"dtype": spec.code, "shape": spec.shape, "data_offsets": [begin, begin + spec.n_bytes]}
            for name, (spec, begin) in listed.items()
        }
        self.header = json.dumps(told, separators=(",", ":"))
        self.entries = {name: Entry(name, spec, begin, begin + spec.n_bytes) for name, (spec, begin) in listed.items()}
        self._start = 0
        if len(self.entries) != len(tensors) + sum(name.startswith("gguf.") for name in self.entries):
            raise ValueError("two tensors of one name")


class _Tensor(NamedTuple):
    """A tensor as the file lists it; it begins at a byte of the file."""

    name: str
    shape: tuple[int, ...]
    type: int
    begin: int

    def spec(self, room: int) -> tuple[TensorSpec, Fields]:
        """What it is stored as, in so many bytes at most, and the fields of its blocks."""
        n = prod(self.shape)
        weights, fields = _BLOCKS.get(self.type, (1, ()))
        if self.type in _FLOATS:
            spec = TensorSpec(_FLOATS[self.type], (n,))
        elif fields and n % weights == 0:
            spec = TensorSpec("U8", (n // weights, sum(TensorSpec(code, (count,)).n_bytes for code, count in fields)))
        else:
            spec, fields = TensorSpec("U8", (room,)), ()
        if spec.n_bytes > room:
            raise ValueError(f"tensor {self.name} does not lie where its type and shape say")
        return spec, fields


class _Reader:
    """Reads the list of tensors."""

    def __init__(self, file: Readable) -> None:
        self._file = file
        self._at = 0
        self._data, self._from = b"", 0

    def tensors(self) -> list[_Tensor]:
        """All tensors.

        Raises:
            ValueError: the file is no sound GGUF file of a version that is known.
        """
        if self._take(4) != b"GGUF":
            raise ValueError("no GGUF file")
        version, n_tensors, n_metadata = self._number("I"), self._number("Q"), self._number("Q")
        if version not in (2, 3) or n_tensors > _MOST or n_metadata > _MOST:
            raise ValueError(f"version {version}, {n_tensors} tensors and {n_metadata} entries")
        alignment = 32
        for _ in range(n_metadata):
            key, of = self._text(), self._number("I")
            if key == "general.alignment" and of == 4:
                alignment = self._number("I")
            else:
                self._skip(of)
        listed = []
        for _ in range(n_tensors):
            name, n_dims = self._text(), self._number("I")
            if n_dims > 8:
                raise ValueError(f"{n_dims} dimensions")
            shape = tuple(self._number("Q") for _ in range(n_dims))
            listed.append((name, shape, self._number("I"), self._number("Q")))
        if not 0 < alignment < _MOST:
            raise ValueError(f"an alignment of {alignment}")
        start = -(-self._at // alignment) * alignment
        return [_Tensor(name, shape, of, start + offset) for name, shape, of, offset in listed]

    def _skip(self, of: int) -> None:
        if of in _SIZES:
            self._take(_SIZES[of])
        elif of == _TEXT:
            self._text()
        elif of == _ARRAY:
            inner, n = self._number("I"), self._number("Q")
            if n > _MOST or inner == _ARRAY:
                raise ValueError("an array of metadata that is too long, or of arrays")
            if inner in _SIZES:
                self._take(n * _SIZES[inner])
            else:
                for _ in range(n):
                    self._skip(inner)
        else:
            raise ValueError(f"metadata of type {of}")

    def _text(self) -> str:
        return self._take(self._number("Q")).decode()

    def _number(self, code: str) -> int:
        [number] = struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))
        return int(number)

    def _take(self, n: int) -> bytes:
        if n < 0 or self._at + n > self._file.size:
            raise ValueError("a header that is cut off")
        if not self._from <= self._at <= self._at + n <= self._from + len(self._data):
            ahead = min(max(n, _AHEAD), self._file.size - self._at)
            self._data, self._from = self._file.read(self._at, ahead).tobytes(), self._at
        begin = self._at - self._from
        self._at += n
        return self._data[begin : begin + n]


def is_gguf(path: Path) -> bool:
    """Whether this is the name of a GGUF file."""
    return path.suffix == f".{GGUF}"


@contextmanager
def gguf_folder(path: Path) -> Iterator[Path]:
    """A folder with nothing but a GGUF file, and a config that says so.

    Raises:
        CheckpointError: there is no such file.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: give a GGUF file")
    with tempfile.TemporaryDirectory() as scratch:
        write_json(Path(scratch) / CONFIG, {"model_type": GGUF})
        (Path(scratch) / path.name).symlink_to(path.resolve())
        yield Path(scratch)
