"""One safetensors file: read a tensor at a time, written a tensor at a time.

The library maps a file, and a mapped file that another process cuts short ends this one without a word; and it
writes a file from memory as a whole. Here a tensor is read when it is asked for, from the very file whose header was
read before.
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
from freebits.storage.remote import Readable, Remote, original
from freebits.types import Bytes, TensorSpec

LENGTH = 8
"""Bytes of the number that a safetensors file begins with: the length of its header."""
METADATA = "__metadata__"
_FREE = '{"__metadata__":{"format":"pt"}}'
ENTRY = len('"":{"dtype":"F8_E4M3FNUZ","shape":,"data_offsets":[,]},') + 2 * len(str(TENSOR_VALUES))
"""An upper bound on the bytes of one header entry, less its name and shape."""


@dataclass(frozen=True)
class Entry:
    """A tensor as the header of a file describes it; its bytes lie at `begin` to `end` behind the header."""

    name: str
    spec: TensorSpec
    begin: int
    end: int


def parse_header(text: str, n_bytes: int | None = None) -> list[Entry]:
    """The tensors that a safetensors header lists, in the order of their bytes; `n_bytes` are behind it, if known.

    Raises:
        ValueError: it is no header; its tensors overlap or leave gaps; their bytes are not those of their kinds.
    """
    try:
        told = json.loads(text, object_pairs_hook=_without_duplicates)
        told.pop(METADATA, None)
        entries = [
            Entry(name, TensorSpec(str(of["dtype"]), tuple(of["shape"])), *of["data_offsets"])
            for name, of in told.items()
        ]
        text.encode()
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"no safetensors header ({error!r})") from None
    if not all(type(entry.begin) is type(entry.end) is int for entry in entries):
        raise ValueError("an offset that is no whole number")
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    at = 0
    for entry in entries:
        if entry.begin != at or entry.end - entry.begin != entry.spec.n_bytes:
            raise ValueError(f"tensor {entry.name} does not lie where its dtype and shape say")
        at = entry.end
    if n_bytes is not None and n_bytes != at:
        raise ValueError(f"{n_bytes} bytes of tensors, where its header promises {at}")
    return entries


class WeightsFile:
    """A safetensors file, its header read and checked; tensors are read when asked for.

    Attributes:
        header: its text, as it is.
        entries: name → tensor, in the order of their bytes.

    Raises:
        CheckpointError: the file is missing, or is no sound safetensors file.
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
            raise CheckpointError(f"{path} is truncated or damaged ({error}): download it again") from None

    def _parse(self, file: Readable) -> None:
        self.header = _read_header(file)
        self._start = LENGTH + len(self.header.encode())
        self.entries = {entry.name: entry for entry in parse_header(self.header, file.size - self._start)}

    @property
    def n_bytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(entry.spec.n_bytes for entry in self.entries.values())

    def read(self, name: str) -> Bytes:
        """The bytes of a tensor.

        Raises:
            CheckpointError: the file can no longer be read, or is not the one that was opened.
        """
        entry = self.entries[name]
        try:
            with self._opened() as file:
                data = file.read(self._start + entry.begin, entry.spec.n_bytes)
                changed = file.state != self._state
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: tensor {name} cannot be read ({error}): download it again") from None
        if changed:
            raise CheckpointError(f"{self.path} was changed while it was read: try again when nothing writes to it")
        return data

    @contextmanager
    def _opened(self) -> Iterator[Readable]:
        """The file, wherever it is."""
        if self._url:
            yield Remote(self._url)
        else:
            with open_regular(self.path) as file:
                yield _Local(file)


@dataclass(frozen=True)
class _Local:
    """A file that is open."""

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
        done = 0
        while done < n_bytes:
            read = self.file.readinto(data[done:].data)
            if not read:
                raise ValueError(f"it ends after {start + done} bytes")
            done += read
        return data


class WeightsWriter:
    """A safetensors file, written a tensor at a time: header length, header, tensors without gaps.

    The header is written last, into room reserved for the announced names and shapes; a longer name or shape does not
    fit. What is left of the room is filled with spaces, as the format allows.
    """

    def __init__(self, path: Path, announced: Mapping[str, tuple[int, ...]]) -> None:
        self.path = path
        self.size = 0
        self.header: dict[str, Any] = {}
        room = len(_FREE) + sum(len(json.dumps(n)) + len(str(list(s))) + ENTRY for n, s in announced.items())
        self._room = -(-room // LENGTH) * LENGTH
        self._file = path.open("wb")
        self._file.seek(LENGTH + self._room)

    def __enter__(self) -> "WeightsWriter":
        return self

    def __exit__(self, spec: type[BaseException] | None, *_: object) -> None:
        if spec is None:
            self.close()
        else:
            self._file.close()

    def write(self, name: str, spec: TensorSpec, data: Bytes) -> None:
        """Append one tensor."""
        end = self.size + spec.n_bytes
        self.header[name] = {"dtype": spec.code, "shape": list(spec.shape), "data_offsets": [self.size, end]}
        self._file.write(data.data)
        self.size = end

    def close(self) -> None:
        """Write the header.

        Raises:
            AssertionError: a tensor was written whose name was not announced, so that the header has no room.
        """
        header = json.dumps({METADATA: {"format": "pt"}, **self.header}, separators=(",", ":")).encode()
        with self._file:
            if len(header) > self._room:
                raise AssertionError(f"{self.path}: a header of {len(header)} bytes in a room of {self._room}")
            self._file.seek(0)
            self._file.write(self._room.to_bytes(LENGTH, "little"))
            self._file.write(header.ljust(self._room))


def open_regular(path: Path) -> FileIO:
    """A file opened to be read, unless it is a pipe or a device, which would not end.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no regular file.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is no regular file")
    return FileIO(path, "r")


def _read_header(file: Readable) -> str:
    length = int.from_bytes(file.read(0, min(LENGTH, file.size)), "little")
    if not LENGTH + 2 <= LENGTH + length <= min(file.size, LENGTH + HEADER_BYTES):
        raise ValueError(f"a header of {length} bytes in {file.size}")
    return bytes(file.read(LENGTH, length)).decode()


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    told = dict(pairs)
    if len(told) != len(pairs):
        raise ValueError(f"a name that is listed twice among {one_line([name for name, _ in pairs], 100)}")
    return told
