"""Read a checkpoint directory: its config, and its tensors one by one."""

import json
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from freebits.errors import CheckpointError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEADER_LENGTH = 8
"""Bytes of the number that a safetensors file begins with."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BOOL": torch.bool,
}
"""The safetensors names of the dtypes freebits reads and writes."""
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file is missing or holds no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: this is not a complete checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}): restore the file") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object: restore the file")
    return content


class Checkpoint:
    """A directory with `config.json` and weights in safetensors, in one file or in shards.

    Headers are read at once, tensors when asked for.

    Raises:
        CheckpointError: the directory is missing, is no checkpoint, holds only pickled weights, or a file
            is truncated or not what the index promises.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not _is_directory(self.path):
            raise CheckpointError(f"{path} is not a folder: give the folder of a downloaded checkpoint")
        if not (self.path / CONFIG).exists():
            raise CheckpointError(f"{path} holds no {CONFIG}: it is not a Hugging Face checkpoint")
        self.config = read_json(self.path / CONFIG)
        self._handles = {file.name: _open(file) for file in self._files()}
        self.files = {name: file for file, handle in self._handles.items() for name in handle.keys()}  # noqa: SIM118
        """Tensor name → file name, in the order of the files."""
        for name, file in self._weight_map().items() if self._sharded else ():
            if name not in self.files:
                raise CheckpointError(f"{self.path / file} lacks tensor {name}: download it again")

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The files that hold the tensors, and the index where there is one."""
        index = [self.path / INDEX] if self._sharded else []
        return (*(self.path / name for name in self._handles), *index)

    @property
    def _sharded(self) -> bool:  # a single file goes first, as in transformers
        return (self.path / INDEX).exists() and not (self.path / SINGLE).exists()

    def _weight_map(self) -> dict[str, str]:
        weight_map = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{self.path / INDEX} has no weight_map: restore the file")
        for file in weight_map.values():
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(
                    f"{self.path / INDEX} names {file!r}, which is no file beside it: restore the index"
                )
        return weight_map

    def _files(self) -> list[Path]:
        if self._sharded:
            return [self.path / file for file in sorted(set(self._weight_map().values()))]
        if (self.path / SINGLE).exists():
            return [self.path / SINGLE]
        pickles = sorted(file.name for pattern in PICKLES for file in self.path.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{self.path} holds only pickled weights ({pickles[0]}), which can run code when read: "
                "save the model as safetensors first"
            )
        raise CheckpointError(f"{self.path} holds no {SINGLE} and no {INDEX}: it has no weights")

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: tuple(self._slice(name).get_shape()) for name in self.files}

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Dtype of every tensor."""
        dtypes = {}
        for name in self.files:
            code = self._slice(name).get_dtype()
            if code not in DTYPES:
                raise CheckpointError(f"tensor {name} in {self.path} has dtype {code}, which is not supported")
            dtypes[name] = DTYPES[code]
        return dtypes

    @cached_property
    def n_bytes(self) -> dict[str, int]:
        """Bytes that every tensor takes in its file, whatever its dtype."""
        told = {file: json.loads(header_of(self.path / file)) for file in self._handles}
        offsets = {name: told[file][name]["data_offsets"] for name, file in self.files.items()}
        return {name: end - begin for name, (begin, end) in offsets.items()}

    def __getitem__(self, name: str) -> Tensor:
        """The tensor called `name`, as stored."""
        if name not in self.files:
            raise CheckpointError(f"tensor {name} is missing in {self.path}: the checkpoint is incomplete")
        try:
            tensor: Tensor = self._handles[self.files[name]].get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self.path / self.files[name]}: tensor {name}: {error}") from None
        return tensor

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its name, read one at a time."""
        return ((name, self[name]) for name in self.files)

    def _slice(self, name: str) -> Any:
        return self._handles[self.files[name]].get_slice(name)


def header_of(file: Path) -> str:
    """The text at the head of a safetensors file, which lists its tensors.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        with safe_open(file, framework="pt"):  # which checks it
            pass
        with file.open("rb") as stream:
            return stream.read(int.from_bytes(stream.read(HEADER_LENGTH), "little")).decode()
    except (OSError, SafetensorError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is truncated or damaged ({error}): download it again") from None


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing, though the index names it: download it again") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or damaged ({error}): download it again") from None


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name too long, for instance
        return False
