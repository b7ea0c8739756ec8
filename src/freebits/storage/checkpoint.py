"""Read the config and the tensors of a checkpoint folder, one tensor at a time."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from freebits.errors import CheckpointError
from freebits.limits import JSON_BYTES, JSON_DEPTH
from freebits.storage.safetensors_files import WeightsFile, open_regular
from freebits.types import Bytes, TensorSpec
from freebits.version import __version__

HISTORY = "freebits"
"""The key of `config.json` under which freebits stores the history of the model."""
CONFIG = "config.json"
WEIGHTS = "model"
"""The stem of the weights files of a model."""
ADAPTER, ADAPTER_STEM = "adapter_config.json", "adapter_model"
"""`ADAPTER`: name of the config of a PEFT adapter. `ADAPTER_STEM`: stem of the name of its weights file."""
_DIFFUSERS_CLASS, _DIFFUSERS_STEM = "_class_name", "diffusion_pytorch_model"
"""`_DIFFUSERS_CLASS`: key that only configs of diffusion components have. `_DIFFUSERS_STEM`: stem of their weights."""
STEMS = (WEIGHTS, _DIFFUSERS_STEM)
"""The stems of weights files that need an index if the weights are in several files."""
GGUF = "gguf"
"""The suffix of GGUF files. It is also the model type in the config that `gguf_folder` writes."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_RESTORE = "download the file again, or restore it from a backup"


def read_text(path: Path) -> str:
    """Return the text of a JSON file.

    Raises:
        CheckpointError: the file is missing, too large, not UTF-8, or cannot be read.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > JSON_BYTES:
                raise ValueError(f"it has more than {JSON_BYTES} bytes")  # noqa: TRY301
            return file.read(size + 1).decode()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete, download it again") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}): {_RESTORE}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        CheckpointError: see `read_text`; or the file does not contain a JSON object, or nests values too deeply.
    """
    try:
        content = json.loads(read_text(path))
        if _depth(content) > JSON_DEPTH:
            raise ValueError(f"it is nested more than {JSON_DEPTH} levels deep")  # noqa: TRY301
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}): {_RESTORE}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not contain a JSON object: {_RESTORE}")
    return content


def _depth(content: object) -> int:
    """Return how deeply the objects and arrays of a JSON value are nested."""
    depth, level = 0, [content]
    while level:
        containers = [
            value.values() if isinstance(value, dict) else value for value in level if isinstance(value, (dict, list))
        ]
        level = [value for values in containers for value in values]
        depth += bool(containers)
    return depth


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object in the layout that transformers uses."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")


class Source(Protocol):
    """A source of a model's tensors: a checkpoint, a packed folder, or a transformed view of another source."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of `config.json`."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The specs of the model's tensors, in the order in which they are stored."""

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            CheckpointError: the tensor is missing or damaged.
        """


class Folder(Source, Protocol):
    """A source that is a folder.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The files that contain tensors, and the index if there is one."""

    @property
    def shard_bytes(self) -> int | None:
        """Bytes of the tensors in the largest file; None if there is only one file."""

    @property
    def history(self) -> list[dict[str, Any]]:
        """The steps that produced the model, oldest first."""


@dataclass(frozen=True)
class View:
    """Base class of sources that change the values of another source's tensors, but neither dtypes nor shapes."""

    source: Source

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of `config.json`."""
        return self.source.config

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The specs of the model's tensors."""
        return self.source.specs


class Checkpoint:
    """A folder with a config, and with safetensors or GGUF weights in one file or in shards. Implements `Folder`.

    The constructor reads the headers of the files. Tensors are read on access.

    Raises:
        CheckpointError: the folder is missing, is not a checkpoint or has only pickled weights; a file is damaged; a
            tensor is in two files; or a tensor that the index lists is missing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = checkpoint_folder(path)
        self.config = read_json(self.path / config_name(self.path))
        self.weights = {file.name: open_weights(file) for file in model_files(self.path, self.config)}
        """File name → weights file, for the files that transformers would load."""
        self.files = {name: file for file, weights in self.weights.items() for name in weights.entries}
        """Tensor name → file name, in the order of the files."""
        counts = Counter(name for weights in self.weights.values() for name in weights.entries)
        if duplicates := [name for name, count in counts.items() if count > 1]:
            raise CheckpointError(
                f"tensor {duplicates[0]} is in two files of {self.path}: download the checkpoint again"
            )
        index = self.path / index_of(stem_of(self.config))
        for name, file in _weight_map(index).items() if self._has_index else ():
            if name not in self.files:
                raise CheckpointError(f"{self.path / file} lacks tensor {name}: download the file again")

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The files that contain the tensors, and the index if there is one."""
        index = (self.path / index_of(stem_of(self.config)),) if self._has_index else ()
        return (*(file.path for file in self.weights.values()), *index)

    @property
    def shard_bytes(self) -> int | None:
        """Bytes of the tensors in the largest file; None if there is only one file."""
        return max(file.n_bytes for file in self.weights.values()) if len(self.weights) > 1 else None

    @property
    def history(self) -> list[dict[str, Any]]:
        """The steps that produced the model, oldest first. Invalid entries of the config are skipped."""
        return history_of(self.config)

    @property
    def _has_index(self) -> bool:
        return f"{stem_of(self.config)}.safetensors" not in self.weights and self.config.get("model_type") != GGUF

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Dtype and shape of every tensor."""
        return self.stored_specs()

    def stored_specs(self) -> dict[str, TensorSpec]:
        """Return dtype and shape of every tensor as the files declare them. The `specs` of a subclass can differ."""
        return {name: self.weights[file].entries[name].spec for name, file in self.files.items()}

    def read(self, name: str) -> Bytes:
        """Read the bytes of a tensor.

        Raises:
            CheckpointError: the tensor is missing, or its file cannot be read or has changed.
        """
        if name not in self.files:
            raise CheckpointError(
                f"tensor {name} is missing in {self.path}: the checkpoint is incomplete, download it again"
            )
        return self.weights[self.files[name]].read(name)

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor as it is stored."""
        data = self.read(name)
        return self.specs[name].view(data)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the names and tensors, and read one tensor at a time."""
        return ((name, self[name]) for name in self.files)


def history_of(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the steps that produced a model, as its `config.json` lists them. Skip invalid entries."""
    entry = config.get(HISTORY)
    history = entry.get("history") if isinstance(entry, dict) else None
    return [step for step in history if isinstance(step, dict)] if isinstance(history, list) else []


def history_step(transform: str, fidelity: str, sizes: Mapping[str, int], **facts: Any) -> dict[str, Any]:
    """Return a new entry of a history.

    Args:
        transform: the name of the command, codec or method of the step.
        fidelity: what the step preserves of the model; see `freebits.options`.
        sizes: version of the model before this step (such as `dense`) → size in bytes.
        facts: settings and measurements of the step.
    """
    producer = f"freebits {__version__}"
    return {"transform": transform, "fidelity": fidelity, **facts, "bytes": dict(sizes), "producer": producer}


def open_weights(path: Path) -> WeightsFile:
    """Open a safetensors or GGUF file and read its header."""
    if path.suffix != f".{GGUF}":
        return WeightsFile(path)
    from freebits.storage.gguf import GgufFile  # here, because `gguf` imports this module

    return GgufFile(path)


def checkpoint_folder(path: str | os.PathLike[str]) -> Path:
    """Check that a path is the folder of a checkpoint, and return the path.

    Raises:
        CheckpointError: the path is not the folder of a checkpoint.
    """
    folder = Path(path)
    try:
        if not folder.is_dir():
            raise CheckpointError(f"{path} is not a folder: give the folder of a downloaded checkpoint")
        if not (folder / CONFIG).exists() and not (folder / ADAPTER).exists():
            raise CheckpointError(f"there is no {CONFIG} in {path}: give the folder of a Hugging Face checkpoint")
    except (OSError, ValueError) as error:  # for example, because the name is too long
        raise CheckpointError(f"{path} is not a folder ({error}): give the folder of a downloaded checkpoint") from None
    return folder


def config_name(folder: Path) -> str:
    """Return the name of the config in the folder of a model or an adapter."""
    return CONFIG if (folder / CONFIG).exists() else ADAPTER


def is_adapter(config: Mapping[str, Any]) -> bool:
    """Return whether a config belongs to a PEFT adapter."""
    return isinstance(config.get("peft_type"), str)


def model_files(path: Path, config: dict[str, Any]) -> list[Path]:
    """Return the weights files that transformers would load from a folder, in the order of their names.

    Raises:
        CheckpointError: there are no weights files, or transformers would load files that freebits does not support.
    """
    if config.get("transformers_weights") is not None:
        raise CheckpointError(
            f"{path / CONFIG} names other weights in transformers_weights, which freebits does not support: "
            "load the model with transformers and save it again"
        )
    if config.get("model_type") == GGUF:
        return sorted(path.glob(f"*.{GGUF}"))
    stem = stem_of(config)
    single, index = path / f"{stem}.safetensors", path / index_of(stem)
    if is_adapter(config):
        if single.exists():
            return [single]
        raise CheckpointError(f"there is no {single.name} in {path}: save the adapter as safetensors")
    if (path / ADAPTER).exists():
        raise CheckpointError(
            f"{path} contains an adapter ({ADAPTER}), which transformers adds to the weights: "
            "merge the adapter into the model first"
        )
    if single.exists():  # a single file takes precedence over an index, as in transformers
        return [single]
    if index.exists():
        return [path / file for file in sorted(set(_weight_map(index).values()))]
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{path} contains only pickled weights ({pickles[0]}), which can run code when they are loaded: "
            "save the model as safetensors first"
        )
    raise CheckpointError(f"there is no {single.name} and no {index.name} in {path}: add the weights as safetensors")


def stem_of(config: Mapping[str, Any]) -> str:
    """Return the stem of the weights files of a model, an adapter or a component of a diffusion pipeline."""
    if is_adapter(config):
        return ADAPTER_STEM
    return _DIFFUSERS_STEM if _DIFFUSERS_CLASS in config and "model_type" not in config else WEIGHTS


def index_of(stem: str) -> str:
    """Return the name of the index, the file that maps tensors to shards."""
    return f"{stem}.safetensors.index.json"


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no weight_map: {_RESTORE}")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{index} lists {file!r}, which is not a plain file name: {_RESTORE}")
    return weight_map
