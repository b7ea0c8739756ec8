"""Read GGUF files without decoding values: the offsets of the tensors and the layout of their blocks.

A block contains a fixed number of consecutive weights of a quantized tensor, and the scales of these weights.
The format is specified in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
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
from freebits.storage.checkpoint import CONFIG, GGUF, write_json
from freebits.storage.remote import Readable
from freebits.storage.safetensors_files import Entry, WeightsFile
from freebits.types import TensorSpec

Fields = tuple[tuple[str, int], ...]
"""The fields of a block, each as dtype name and number of values."""
_DTYPES = {0: "F32", 1: "F16", 30: "BF16", 28: "F64", 24: "I8", 25: "I16", 26: "I32", 27: "I64"}
_SCALE, _SCALE_AND_MIN = ("F16", 1), (("F16", 1), ("F16", 1))
_BLOCKS: dict[int, tuple[int, Fields]] = {
    2: (32, (_SCALE, ("U8", 16))),  # Q4_0
    3: (32, (*_SCALE_AND_MIN, ("U8", 16))),  # Q4_1
    6: (32, (_SCALE, ("U8", 4), ("U8", 16))),  # Q5_0
    7: (32, (*_SCALE_AND_MIN, ("U8", 4), ("U8", 16))),  # Q5_1
    8: (32, (_SCALE, ("U8", 32))),  # Q8_0
    10: (256, (("U8", 16), ("U8", 64), *_SCALE_AND_MIN)),  # Q2_K
    11: (256, (("U8", 32), ("U8", 64), ("U8", 12), _SCALE)),  # Q3_K
    12: (256, (*_SCALE_AND_MIN, ("U8", 12), ("U8", 128))),  # Q4_K
    13: (256, (*_SCALE_AND_MIN, ("U8", 12), ("U8", 32), ("U8", 128))),  # Q5_K
    14: (256, (("U8", 128), ("U8", 64), ("U8", 16), _SCALE)),  # Q6_K
    39: (32, (("U8", 1), ("U8", 16))),  # MXFP4
}
"""Tensor type → number of weights and fields of a block. Types not listed here or in `_DTYPES` are read as bytes."""
_METADATA_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Metadata type → size of a value in bytes."""
_U32, _STRING, _ARRAY = 4, 8, 9
"""Three metadata types: unsigned 32-bit integer (`_U32`), string and array."""
_READ_AHEAD = 1 << 20
"""Number of bytes that `_Reader` reads from the file at once, unless a value has more bytes."""
_MAX_COUNT = 1 << 24
"""Upper bound on the number of metadata entries, of tensors and of items of an array, and on the alignment."""


class GgufFile(WeightsFile):
    """A GGUF file, presented as a sequence of tensors that cover all of its bytes. Tensors are read on access.

    Attributes:
        header: the header that a safetensors file of these tensors would have.
        entries: tensor name → entry, in the order of the bytes. The bytes between tensors are entries named `gguf.0`,
            `gguf.1`, ….
        fields: name of a tensor that consists of blocks → fields of a block.

    Raises:
        CheckpointError: the file is missing or is not a valid GGUF file.
    """

    def _parse(self, file: Readable) -> None:
        reader = _Reader(file)
        tensors = sorted(reader.tensors(), key=lambda tensor: tensor.begin)
        position = 0
        self.fields: dict[str, Fields] = {}
        specs: dict[str, tuple[TensorSpec, int]] = {}
        for number, tensor in enumerate([*tensors, None]):
            begin = file.size if tensor is None else tensor.begin
            if begin < position:
                raise ValueError("its tensors overlap or lie outside the file")
            if begin > position:
                specs[f"gguf.{number}"] = TensorSpec("U8", (begin - position,)), position
            if tensor is not None:
                end = tensors[number + 1].begin if number + 1 < len(tensors) else file.size
                spec, fields = tensor.spec(end - begin)
                specs[tensor.name] = spec, begin
                self.fields |= {tensor.name: fields} if fields else {}
                position = begin + spec.n_bytes
        header = {
            name: {"dtype": spec.dtype_name, "shape": spec.shape, "data_offsets": [begin, begin + spec.n_bytes]}
            for name, (spec, begin) in specs.items()
        }
        self.header = json.dumps(header, separators=(",", ":"))
        self.entries = {name: Entry(name, spec, begin, begin + spec.n_bytes) for name, (spec, begin) in specs.items()}
        self._start = 0
        if len(self.entries) != len(tensors) + sum(name.startswith("gguf.") for name in self.entries):
            raise ValueError("two of its tensors have the same name")


class _Tensor(NamedTuple):
    """A tensor as the file lists it. `begin` is the offset of the tensor from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: int
    begin: int

    def spec(self, max_bytes: int) -> tuple[TensorSpec, Fields]:
        """Return the spec with which the tensor is read, and the fields of its blocks (empty if it has no blocks).

        Raises:
            ValueError: the tensor needs more than `max_bytes`.
        """
        n_weights = prod(self.shape)
        block_weights, fields = _BLOCKS.get(self.type, (1, ()))
        if self.type in _DTYPES:
            spec = TensorSpec(_DTYPES[self.type], (n_weights,))
        elif fields and n_weights % block_weights == 0:
            block_bytes = sum(TensorSpec(dtype_name, (count,)).n_bytes for dtype_name, count in fields)
            spec = TensorSpec("U8", (n_weights // block_weights, block_bytes))
        else:
            spec, fields = TensorSpec("U8", (max_bytes,)), ()
        if spec.n_bytes > max_bytes:
            raise ValueError(f"tensor {self.name} has fewer bytes than its type and shape require")
        return spec, fields


class _Reader:
    """Reads the list of tensors from the start of a file."""

    def __init__(self, file: Readable) -> None:
        self._file = file
        self._position = 0
        self._buffer, self._buffer_start = b"", 0

    def tensors(self) -> list[_Tensor]:
        """Return all tensors.

        Raises:
            ValueError: the file is not a valid GGUF file of version 2 or 3.
        """
        if self._read(4) != b"GGUF":
            raise ValueError("it is not a GGUF file")
        version, n_tensors, n_metadata = self._integer("I"), self._integer("Q"), self._integer("Q")
        if version not in (2, 3) or n_tensors > _MAX_COUNT or n_metadata > _MAX_COUNT:
            raise ValueError(f"it declares version {version}, {n_tensors} tensors and {n_metadata} metadata entries")
        alignment = 32
        for _ in range(n_metadata):
            key, value_type = self._string(), self._integer("I")
            if key == "general.alignment" and value_type == _U32:
                alignment = self._integer("I")
            else:
                self._skip(value_type)
        rows = []
        for _ in range(n_tensors):
            name, n_dims = self._string(), self._integer("I")
            if n_dims > 8:
                raise ValueError(f"tensor {name} has {n_dims} dimensions")
            shape = tuple(self._integer("Q") for _ in range(n_dims))
            rows.append((name, shape, self._integer("I"), self._integer("Q")))
        if not 0 < alignment < _MAX_COUNT:
            raise ValueError(f"its alignment is {alignment}")
        start = -(-self._position // alignment) * alignment
        return [_Tensor(name, shape, tensor_type, start + offset) for name, shape, tensor_type, offset in rows]

    def _skip(self, value_type: int) -> None:
        if value_type in _METADATA_BYTES:
            self._read(_METADATA_BYTES[value_type])
        elif value_type == _STRING:
            self._string()
        elif value_type == _ARRAY:
            item_type, count = self._integer("I"), self._integer("Q")
            if count > _MAX_COUNT or item_type == _ARRAY:
                raise ValueError("an array in its metadata is too long or contains arrays")
            if item_type in _METADATA_BYTES:
                self._read(count * _METADATA_BYTES[item_type])
            else:
                for _ in range(count):
                    self._skip(item_type)
        else:
            raise ValueError(f"its metadata has a value of unknown type {value_type}")

    def _string(self) -> str:
        return self._read(self._integer("Q")).decode()

    def _integer(self, struct_format: str) -> int:
        [value] = struct.unpack(f"<{struct_format}", self._read(struct.calcsize(f"<{struct_format}")))
        return int(value)

    def _read(self, n_bytes: int) -> bytes:
        end = self._position + n_bytes
        if n_bytes < 0 or end > self._file.size:
            raise ValueError("its header is truncated")
        if not self._buffer_start <= self._position <= end <= self._buffer_start + len(self._buffer):
            ahead = min(max(n_bytes, _READ_AHEAD), self._file.size - self._position)
            self._buffer, self._buffer_start = self._file.read(self._position, ahead).tobytes(), self._position
        begin = self._position - self._buffer_start
        self._position = end
        return self._buffer[begin : begin + n_bytes]


def is_gguf(path: Path) -> bool:
    """Return whether a path has the suffix of a GGUF file."""
    return path.suffix == f".{GGUF}"


@contextmanager
def gguf_folder(path: Path) -> Iterator[Path]:
    """Create a temporary folder with a link to a GGUF file and a config of model type `gguf`.

    Raises:
        CheckpointError: the file does not exist.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: give the path of a GGUF file")
    with tempfile.TemporaryDirectory() as scratch:
        write_json(Path(scratch) / CONFIG, {"model_type": GGUF})
        (Path(scratch) / path.name).symlink_to(path.resolve())
        yield Path(scratch)
