"""Write a checkpoint directory: one tensor at a time, all or nothing."""

import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freebits.checkpoint.reader import CONFIG, DTYPE_CODES, INDEX, PICKLES, SINGLE, Checkpoint
from freebits.errors import CheckpointError

_LEFT_BEHIND = ("*.safetensors", "*.index.json", "*.gguf", "*.h5", "*.msgpack", "*.onnx*", "*.pkl", "*.py")
_FOLDERS = ("additional_chat_templates",)
"""The folders in which transformers keeps a tokenizer's files."""
REMOTE_CODE = "modeling_freebits.py"
"""The only code in a checkpoint of ours; it imports freebits."""
_ALIGNMENT = 8
_METADATA = '{"__metadata__":{"format":"pt"}}'
_ENTRY = len('"":{"dtype":"BF16","shape":[,],"data_offsets":[,]},') + 4 * len(str(2**63))
"""An upper bound on the bytes of one header entry, less its name."""


@contextmanager
def new_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A directory that appears at `path` complete when the block ends, and not at all if it raises.

    Raises:
        CheckpointError: something exists at `path`, or nothing can be written beside it.
    """
    target = Path(path).absolute()
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        if target.exists() or target.is_symlink():
            raise CheckpointError(f"{path} exists already: choose another output folder or remove it")
        missing = [parent for parent in target.parents if not parent.exists()]
        draft.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be created: {error.strerror}") from None
    try:
        yield draft
        draft.rename(target)
    except OSError as error:
        if error.errno is None:  # no operating system's error, and none of writing
            raise
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if not target.exists():
            for parent in missing:
                parent.rmdir()


class CheckpointWriter:
    """Stream tensors into safetensors files, a new one when the next tensor would pass `shard_bytes`.

    The library writes a whole file from memory; this one holds a tensor at a time. Room for the header is left
    in front and padded with spaces, as the format allows, so `names` must list every tensor that may come.
    """

    def __init__(self, directory: Path, names: Iterable[str], shard_bytes: int | None = None) -> None:
        self._directory = directory
        self._names = list(names)
        self._shard_bytes = shard_bytes
        self._shards: list[SafetensorsFile] = []

    @classmethod
    def like(cls, source: Checkpoint, directory: Path, names: Iterable[str]) -> "CheckpointWriter":
        """A writer whose shards are as large as the largest of `source`: one file if that is one file."""
        sizes: Counter[str] = Counter()
        for name, file in source.files.items():
            sizes[file] += prod(source.shapes[name]) * source.dtypes[name].itemsize
        return cls(directory, names, shard_bytes=max(sizes.values()) if len(sizes) > 1 else None)

    def __enter__(self) -> "CheckpointWriter":
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Append one tensor."""
        full = self._shards and self._shard_bytes and self._shards[-1].size + tensor.nbytes > self._shard_bytes
        if full or not self._shards:
            if self._shards:
                self._shards[-1].close()
            self._shards.append(SafetensorsFile(self._directory / f"{len(self._shards)}.part", self._names))
        self._shards[-1].write(name, tensor)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._shards:
            self._shards[-1].close()
        if kind is None:
            self._name_shards()

    def _name_shards(self) -> None:
        if len(self._shards) == 1:
            self._shards[0].path.rename(self._directory / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(self._shards, start=1):
            file = f"model-{number:05}-of-{len(self._shards):05}.safetensors"
            shard.path.rename(self._directory / file)
            weight_map |= dict.fromkeys(shard.header, file)
        total = sum(shard.size for shard in self._shards)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (self._directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class SafetensorsFile:
    """One safetensors file, written a tensor at a time: header length, header, tensors without gaps.

    Room for the header is left in front, so `names` must list every tensor that may come.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self.path = path
        self.size = 0
        self.header: dict[str, Any] = {}
        self._room = _aligned(len(_METADATA) + sum(len(json.dumps(name)) + _ENTRY for name in names))
        self._file = path.open("wb")
        self._file.seek(_ALIGNMENT + self._room)

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Append one tensor."""
        data = tensor.detach().cpu().contiguous()
        end = self.size + data.nbytes
        self.header[name] = {
            "dtype": DTYPE_CODES[data.dtype],
            "shape": list(data.shape),
            "data_offsets": [self.size, end],
        }
        self._file.write(data.reshape(-1).view(torch.uint8).numpy().data)
        self.size = end

    def close(self) -> None:
        """Write the header."""
        header = json.dumps({"__metadata__": {"format": "pt"}, **self.header}, separators=(",", ":"))
        self._file.seek(0)
        self._file.write(self._room.to_bytes(_ALIGNMENT, "little"))
        self._file.write(header.encode().ljust(self._room))
        self._file.close()


def carry_over(source: Path, target: Path, *, but: Iterable[str] = ()) -> None:
    """Copy what is beside the weights: tokenizer, chat templates, generation settings, licence, model card.

    Weights in any form, code that is not ours, `config.json` and the names in `but` stay behind; so does what is
    hidden or in another folder, which may be another checkpoint.
    """
    left = {CONFIG, *but}
    beside = [*source.iterdir(), *(file for folder in _FOLDERS for file in (source / folder).glob("*"))]
    for file in sorted(path for path in beside if path.is_file()):
        name = file.relative_to(source)
        foreign = any(file.match(pattern) for pattern in (*PICKLES, *_LEFT_BEHIND)) and str(name) != REMOTE_CODE
        if not (foreign or file.name.startswith(".") or str(name) in left):
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copy2(file, target / name)


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT
