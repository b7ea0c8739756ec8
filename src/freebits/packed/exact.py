"""Codec `none`: the safetensors files of any checkpoint, whatever the architecture, to come back byte for byte.

Each file becomes one of the same name, in which every tensor is a row of bytes: its entropy code, or its own bytes
where that does not gain. The original headers are in the manifest.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from freebits.checkpoint import DTYPES, HEADER_LENGTH, Checkpoint, SafetensorsFile, carry_over, header_of
from freebits.coding.bits import as_tensor
from freebits.entropy import compress, decompress
from freebits.entropy.planes import Bytes
from freebits.errors import CheckpointError
from freebits.packed.format import MANIFEST, Manifest
from freebits.packed.parallel import ordered_map, workers
from freebits.packed.storage import MOST, Kind, bytes_of, digest
from freebits.progress import Progress

_BESIDE = ("config.json", "*.index.json", "*.py")
"""What is copied here though `carry_over` leaves it behind: it belongs to the model as it is."""


@dataclass(frozen=True)
class Entry:
    """A tensor as the header of a file describes it."""

    file: str
    name: str
    kind: Kind
    begin: int
    end: int

    @property
    def key(self) -> str:
        """Under which the manifest lists it: two files may hold tensors of one name."""
        return f"{self.file}/{self.name}"


def entries(file: str, header: str) -> list[Entry]:
    """The tensors of a file, in the order of their bytes.

    Raises:
        ValueError: the text is no safetensors header.
    """
    try:
        listed = [
            Entry(file, name, Kind(str(told["dtype"]), tuple(told["shape"])), *told["data_offsets"])
            for name, told in json.loads(header).items()
            if name != "__metadata__"
        ]
        header.encode()
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"the header of {file} is damaged ({error})") from None
    sizes = chain.from_iterable((entry.begin, entry.end, *entry.kind.shape) for entry in listed)
    if not all(type(size) is int and 0 <= size < MOST for size in sizes):
        raise ValueError(f"the header of {file} has a size that cannot be")
    listed.sort(key=lambda entry: (entry.begin, entry.end))
    ends = [0, *(entry.end for entry in listed)]
    if any(entry.begin != end or entry.end < end for entry, end in zip(listed, ends, strict=False)):
        raise ValueError(f"the header of {file} leaves gaps")
    return listed


def pack_exactly(
    source: Checkpoint, directory: Path, entropy: bool, jobs: int | None, progress: Progress
) -> dict[str, Any]:
    """Write the packed files of a checkpoint and what lies beside them; returns what the manifest says of them.

    Raises:
        CheckpointError: a file is damaged.
    """
    _copy_beside(source.path, directory)
    headers = {file.name: header_of(file) for file in sorted(source.path.glob("*.safetensors"))}
    contents = {file: entries(file, header) for file, header in headers.items()}
    total, done, digests = sum(map(len, contents.values())), 0, {}
    with workers(jobs) as executor:
        for file, listed in contents.items():
            data = _data(source.path / file, headers[file])

            def stored(entry: Entry, data: Bytes = data) -> tuple[Entry, Tensor, str]:
                part = data[entry.begin : entry.end]
                coded = compress(part, entry.kind.code) if entropy else None
                return entry, as_tensor(part.tobytes() if coded is None else coded), digest(entry.kind, part)

            with SafetensorsFile(directory / file, [entry.name for entry in listed]) as writer:
                for entry, tensor, found in ordered_map(executor, stored, listed):
                    writer.write(entry.name, tensor)
                    digests[entry.key] = found
                    progress(done := done + 1, total)
    return {"dtype": "", "threshold": None, "sites": [], "tensors": digests, "coded": {}, "headers": headers}


class ExactCheckpoint:
    """A folder packed with codec `none`; tensors are decoded and checked as they are read.

    Raises:
        CheckpointError: a file is missing or damaged; of a tensor that is noticed when it is read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.manifest = Manifest.read(self.path)
        self._files: dict[str, Any] = {}
        try:
            self.contents = {file: entries(file, header) for file, header in self.manifest.headers.items()}
            self._files = {file: safe_open(self.path / _checked(file), framework="pt") for file in self.contents}
        except (ValueError, OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} is damaged ({error}): download it again") from None
        listed = {entry.key for entry in self._entries}
        stored = {f"{file}/{name}" for file, handle in self._files.items() for name in handle.keys()}  # noqa: SIM118
        for key in sorted((listed ^ stored) | (listed ^ self.manifest.tensors.keys())):
            raise CheckpointError(f"{path}: {key} is not in header, file and manifest alike: download it again")

    def read(self, entry: Entry) -> Bytes:
        """The bytes of a tensor.

        Raises:
            CheckpointError: they are damaged.
        """
        stored = bytes_of(self._files[entry.file].get_tensor(entry.name))
        n_bytes = entry.end - entry.begin
        try:
            coded = len(stored) < n_bytes
            data = decompress(stored, entry.kind.code, n_bytes) if coded else stored[:n_bytes]
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {entry.key} cannot be decoded ({error}): download it again") from None
        if digest(entry.kind, data) != self.manifest.tensors[entry.key]:
            raise CheckpointError(f"{self.path}: {entry.key} does not match its digest: download it again")
        return data

    def tensors(self, jobs: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of the model, decoded as it is asked for; other weights may lie beside it.

        Raises:
            CheckpointError: a tensor is damaged, or of a dtype that this version does not know.
        """

        def tensor(entry: Entry) -> tuple[str, Tensor]:
            if entry.kind.code not in DTYPES:
                raise CheckpointError(f"tensor {entry.name} has dtype {entry.kind.code}: unpack it, then load")
            data = torch.from_numpy(np.require(self.read(entry), requirements="W"))
            return entry.name, data.view(DTYPES[entry.kind.code]).reshape(entry.kind.shape)

        with workers(jobs) as executor:
            yield from ordered_map(executor, tensor, self._model)

    def check(self, jobs: int | None = None) -> None:
        """Decode everything, each digest checked.

        Raises:
            CheckpointError: a tensor is damaged.
        """
        with workers(jobs) as executor:
            for _ in ordered_map(executor, self.read, self._entries):
                pass

    def unpack(self, directory: Path, jobs: int | None, progress: Progress) -> None:
        """Write the original files and what lies beside them into a new folder.

        Raises:
            CheckpointError: a tensor is damaged.
        """
        _copy_beside(self.path, directory)
        total, done = len(self._entries), 0
        with workers(jobs) as executor:
            for file, listed in self.contents.items():
                header = self.manifest.headers[file].encode()
                with (directory / file).open("wb") as target:
                    target.write(len(header).to_bytes(HEADER_LENGTH, "little") + header)
                    for data in ordered_map(executor, self.read, listed):
                        target.write(data.data)
                        progress(done := done + 1, total)

    @property
    def n_parameters(self) -> int:
        """Numbers of the model."""
        return sum(prod(entry.kind.shape) for entry in self._model)

    @property
    def _model(self) -> list[Entry]:
        """The tensors of the files that are loaded."""
        files = {file.name for file in Checkpoint(self.path).weight_files}
        return [entry for entry in self._entries if entry.file in files]

    @property
    def _entries(self) -> list[Entry]:
        return [entry for listed in self.contents.values() for entry in listed]


def _copy_beside(source: Path, target: Path) -> None:
    carry_over(source, target, but=[MANIFEST])
    for beside in chain.from_iterable(map(source.glob, _BESIDE)):
        shutil.copy2(beside, target / beside.name)


def _checked(file: str) -> str:
    if Path(file).name != file or not file.endswith(".safetensors"):
        raise ValueError(f"{file!r} is no weights file beside the manifest")
    return file


def _data(file: Path, header: str) -> Bytes:
    """The bytes of a file behind its header, mapped."""
    start = HEADER_LENGTH + len(header.encode())
    if file.stat().st_size == start:
        return np.empty(0, np.uint8)
    return np.memmap(file, np.uint8, "r", offset=start)
