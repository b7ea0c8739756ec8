"""Read and write safetensors files one tensor at a time.

This module does not use the safetensors library, for two reasons. The library maps files into memory: if another
process truncates a mapped file, the system kills this process without a message. And the library needs all tensors in
memory to write a file. `WeightsFile` reads each tensor on access, and raises an error if the file has changed since its
header was read. `WeightsWriter` writes one tensor after another.
"""

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from freebits.errors import CheckpointError, one_line
from freebits.limits import HEADER_BYTES, TENSOR_VALUES
from freebits.storage.remote import Readable, RemoteFile, original
from freebits.types import Bytes, TensorSpec

LENGTH = 8
"""Size in bytes of the integer at the start of a safetensors file. The integer is the length of the header."""
METADATA = "__metadata__"
_EMPTY_HEADER = '{"__metadata__":{"format":"pt"}}'
ENTRY = len('"":{"dtype":"F8_E4M3FNUZ","shape":,"data_offsets":[,]},') + 2 * len(str(TENSOR_VALUES))
"""An upper bound on the bytes of a header entry without its name and shape."""


@dataclass(frozen=True)
class Entry:
    """A tensor as a header describes it. Its bytes are at `begin` to `end`, counted from the end of the header."""

    name: str
    spec: TensorSpec
    begin: int
    end: int


def parse_header(text: str, n_bytes: int | None = None) -> list[Entry]:
    """Return the tensors that a safetensors header lists, in the order of their bytes.

    Args:
        text: the header.
        n_bytes: the number of bytes that follow the header; None if this number is unknown.

    Raises:
        ValueError: the text is not a header, tensors overlap or leave gaps, or sizes do not match.
    """
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
        header.pop(METADATA, None)
        entries = [
            Entry(name, TensorSpec(str(fields["dtype"]), tuple(fields["shape"])), *fields["data_offsets"])
            for name, fields in header.items()
        ]
        text.encode()
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it has no safetensors header ({error!r})") from None
    if not all(type(entry.begin) is type(entry.end) is int for entry in entries):
        raise ValueError("an offset in its header is not an integer")
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    position = 0
    for entry in entries:
        if entry.begin != position or entry.end - entry.begin != entry.spec.n_bytes:
            raise ValueError(
                f"the offsets of tensor {entry.name} do not match its dtype and shape, overlap or leave a gap"
            )
        position = entry.end
    if n_bytes is not None and n_bytes != position:
        raise ValueError(f"it has {n_bytes} bytes of tensors, but its header declares {position}")
    return entries


class WeightsFile:
    """A safetensors file. The constructor reads and checks the header; tensors are read on access.

    Attributes:
        header: the text of the header, unchanged.
        entries: tensor name → entry, in the order of the bytes.

    Raises:
        CheckpointError: the file is missing, cannot be read or is not a valid safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._url = original(path)
        try:
            with self._opened() as file:
                self._state = file.state
                self._parse(file)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing: the checkpoint is incomplete, download it again") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} cannot be read or is damaged ({error}): check its permissions, or download it again"
            ) from None

    def _parse(self, file: Readable) -> None:
        self.header = _read_header(file)
        self._start = LENGTH + len(self.header.encode())
        self.entries = {entry.name: entry for entry in parse_header(self.header, file.size - self._start)}

    @property
    def n_bytes(self) -> int:
        """Number of bytes of all tensors."""
        return sum(entry.spec.n_bytes for entry in self.entries.values())

    def read(self, name: str) -> Bytes:
        """Read the bytes of a tensor.

        Raises:
            CheckpointError: the file cannot be read any more, or has changed since its header was read.
        """
        entry = self.entries[name]
        try:
            with self._opened() as file:
                data = file.read(self._start + entry.begin, entry.spec.n_bytes)
                changed = file.state != self._state
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"tensor {name} in {self.path} cannot be read ({error}): check the permissions and the connection, or "
                "download the file again"
            ) from None
        if changed:
            raise CheckpointError(
                f"{self.path} was changed while it was read: rerun the command when nothing writes to the file"
            )
        return data

    @contextmanager
    def _opened(self) -> Iterator[Readable]:
        """Open the local or remote file."""
        if self._url:
            yield RemoteFile(self._url)
        else:
            with open_regular(self.path) as file:
                yield _LocalFile(file)


@dataclass(frozen=True)
class _LocalFile:
    """An open local file. Implements `Readable`."""

    file: FileIO

    @property
    def size(self) -> int:
        return os.fstat(self.file.fileno()).st_size

    @property
    def state(self) -> tuple[object, ...]:
        status = os.fstat(self.file.fileno())
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

    def read(self, start: int, n_bytes: int) -> Bytes:
        data = np.empty(n_bytes, np.uint8)
        self.file.seek(start)
        n_read = 0
        while n_read < n_bytes:
            count = self.file.readinto(data[n_read:].data)
            if not count:
                raise ValueError(f"it ends after {start + n_read} bytes")
            n_read += count
        return data


class WeightsWriter:
    """Writes a safetensors file one tensor at a time.

    The file contains the length of the header, the header, and the tensors without gaps. The header is written last,
    into room that is reserved for the names and shapes in `announced`. Space characters fill the rest of this room, as
    the format allows.

    Attributes:
        path: the file.
        size: number of bytes of the tensors written so far.
        header: name → dtype, shape and offsets of each tensor written so far.

    Args:
        path: the file to create.
        announced: name → shape of every tensor that can be written.
    """

    def __init__(self, path: Path, announced: Mapping[str, tuple[int, ...]]) -> None:
        self.path = path
        self.size = 0
        self.header: dict[str, Any] = {}
        reserved = len(_EMPTY_HEADER) + sum(
            len(json.dumps(name)) + len(str(list(shape))) + ENTRY for name, shape in announced.items()
        )
        self._reserved = -(-reserved // LENGTH) * LENGTH
        self._file = path.open("wb")
        self._file.seek(LENGTH + self._reserved)

    def __enter__(self) -> "WeightsWriter":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is None:
            self.close()
        else:
            self._file.close()

    def write(self, name: str, spec: TensorSpec, data: Bytes) -> None:
        """Append one tensor."""
        end = self.size + spec.n_bytes
        self.header[name] = {"dtype": spec.dtype_name, "shape": list(spec.shape), "data_offsets": [self.size, end]}
        self._file.write(data.data)
        self.size = end

    def close(self) -> None:
        """Write the header.

        Raises:
            AssertionError: the header does not fit, because a tensor or its shape was not announced.
        """
        header = json.dumps({METADATA: {"format": "pt"}, **self.header}, separators=(",", ":")).encode()
        with self._file:
            if len(header) > self._reserved:
                raise AssertionError(
                    f"{self.path}: the header has {len(header)} bytes, but {self._reserved} are reserved"
                )
            self._file.seek(0)
            self._file.write(self._reserved.to_bytes(LENGTH, "little"))
            self._file.write(header.ljust(self._reserved))


def open_regular(path: Path) -> FileIO:
    """Open a regular file for reading. Refuse pipes and devices, because reading them might never end.

    Raises:
        OSError: the file cannot be opened.
        ValueError: the path is not a regular file.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is not a regular file")
    return FileIO(path, "r")


def _read_header(file: Readable) -> str:
    length = int.from_bytes(file.read(0, min(LENGTH, file.size)), "little")
    if not LENGTH + 2 <= LENGTH + length <= min(file.size, LENGTH + HEADER_BYTES):
        raise ValueError(f"its header of {length} bytes is too short, too long or does not fit into {file.size} bytes")
    return bytes(file.read(LENGTH, length)).decode()


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError(f"its header has duplicate names among {one_line([name for name, _ in pairs], 100)}")
    return unique
