"""A checkpoint folder: its config, and its tensors one by one."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from freebits.errors import CheckpointError
from freebits.limits import JSON_BYTES, JSON_DEPTH
from freebits.storage.weights import WeightsFile, open_regular
from freebits.types import Bytes, TensorSpec

CONFIG = "config.json"
WEIGHTS = "model"
"""How the files of weights begin."""
ADAPTER, ADAPTER_STEM = "adapter_config.json", "adapter_model"
"""Of a PEFT adapter: its config, and how the file of its weights begins."""
_DIFFUSERS_CLASS, _DIFFUSERS_STEM = "_class_name", "diffusion_pytorch_model"
"""Of a component of a diffusion pipeline: what its config has, and how the files of its weights begin."""
STEMS = (WEIGHTS, _DIFFUSERS_STEM)
"""How files begin of which there is an index, if there are several."""
GGUF = "gguf"
"""The model type, and the ending, of a GGUF file that stands for a checkpoint."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_text(path: Path) -> str:
    """The text of a JSON file.

    Raises:
        CheckpointError: the file is missing, or no text of a sensible size.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > JSON_BYTES:
                raise ValueError(f"more than {JSON_BYTES} bytes")  # noqa: TRY301
            return file.read(size + 1).decode()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: this is not a complete checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}): restore the file") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file is missing or holds no JSON object.
    """
    try:
        content = json.loads(read_text(path))
        if _depth(content) > JSON_DEPTH:
            raise ValueError(f"nested more than {JSON_DEPTH} deep")  # noqa: TRY301
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}): restore the file") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object: restore the file")
    return content


def _depth(content: object) -> int:
    """How deep a JSON value nests."""
    depth, level = 0, [content]
    while level:
        inner = [
            value.values() if isinstance(value, dict) else value for value in level if isinstance(value, (dict, list))
        ]
        level = [value for values in inner for value in values]
        depth += bool(inner)
    return depth


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object as transformers writes its own."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")


class Source(Protocol):
    """Where a model's tensors come from: a checkpoint, a packed folder, or another source seen in another form."""

    @property
    def config(self) -> Mapping[str, Any]:
        """What `config.json` says of the model."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The model's tensors, in the order in which they are stored."""

    def __getitem__(self, name: str) -> Tensor:
        """The tensor called `name`, read now.

        Raises:
            CheckpointError: it is damaged, or there is none.
        """


@dataclass(frozen=True)
class View:
    """A source whose tensors are seen in another form, of the same kinds. What derives from it implements `Source`."""

    source: Source

    @property
    def config(self) -> Mapping[str, Any]:
        """What `config.json` says of the model."""
        return self.source.config

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The model's tensors."""
        return self.source.specs


class Checkpoint:
    """A folder with `config.json` and weights in safetensors, in one file or in shards. Implements `Source`.

    Headers are read at once, tensors when asked for.

    Raises:
        CheckpointError: the folder is missing, is no checkpoint, holds only pickled weights, or a file
            is truncated or not what the index promises.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = existing_folder(path)
        self.config = read_json(self.path / config_name(self.path))
        self.weights = {file.name: opened_weights(file) for file in model_files(self.path, self.config)}
        """File name → file, of those that are the model."""
        self.files = {name: file for file, weights in self.weights.items() for name in weights.entries}
        """Tensor name → file name, in the order of the files."""
        if sum(len(weights.entries) for weights in self.weights.values()) > len(self.files):
            raise CheckpointError(f"{self.path}: two of its files hold a tensor of one name: download it again")
        index = self.path / index_of(stem_of(self.config))
        for name, file in _weight_map(index).items() if self._has_index else ():
            if name not in self.files:
                raise CheckpointError(f"{self.path / file} lacks tensor {name}: download it again")

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The files that hold the tensors, and the index where there is one."""
        index = (self.path / index_of(stem_of(self.config)),) if self._has_index else ()
        return (*(file.path for file in self.weights.values()), *index)

    @property
    def _has_index(self) -> bool:
        return f"{stem_of(self.config)}.safetensors" not in self.weights and self.config.get("model_type") != GGUF

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Dtype and shape of every tensor."""
        return self.stored_specs()

    def stored_specs(self) -> dict[str, TensorSpec]:
        """The same, as the files have them."""
        return {name: self.weights[file].entries[name].spec for name, file in self.files.items()}

    def read(self, name: str) -> Bytes:
        """The bytes of a tensor."""
        if name not in self.files:
            raise CheckpointError(f"tensor {name} is missing in {self.path}: the checkpoint is incomplete")
        return self.weights[self.files[name]].read(name)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor called `name`, as stored."""
        data = self.read(name)
        return self.specs[name].view(data)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its name, read one at a time."""
        return ((name, self[name]) for name in self.files)


def opened_weights(path: Path) -> WeightsFile:
    """A weights file, its header read."""
    if path.suffix != f".{GGUF}":
        return WeightsFile(path)
    from freebits.storage.gguf import GgufFile  # which needs this module

    return GgufFile(path)


def existing_folder(path: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint.

    Raises:
        CheckpointError: it is none.
    """
    folder = Path(path)
    try:
        if not folder.is_dir():
            raise CheckpointError(f"{path} is not a folder: give the folder of a downloaded checkpoint")
        if not (folder / CONFIG).exists() and not (folder / ADAPTER).exists():
            raise CheckpointError(f"{path} holds no {CONFIG}: it is not a Hugging Face checkpoint")
    except (OSError, ValueError) as error:  # a name too long, for instance
        raise CheckpointError(f"{path} is not a folder ({error}): give the folder of a downloaded checkpoint") from None
    return folder


def config_name(folder: Path) -> str:
    """The file that says what a folder holds: a model, or an adapter."""
    return CONFIG if (folder / CONFIG).exists() else ADAPTER


def is_adapter(config: Mapping[str, Any]) -> bool:
    """Whether this is the config of a PEFT adapter, which changes another model's layers."""
    return isinstance(config.get("peft_type"), str)


def model_files(path: Path, config: dict[str, Any]) -> list[Path]:
    """The weights files that transformers would load from a folder, in the order of their names.

    Raises:
        CheckpointError: there are none; or what would be loaded is more than such files, and freebits does not follow.
    """
    if config.get("transformers_weights") is not None:
        raise CheckpointError(
            f"{path / CONFIG} names other weights (transformers_weights), which freebits does not follow: "
            f"load the model and save it again"
        )
    if config.get("model_type") == GGUF:
        return sorted(path.glob(f"*.{GGUF}"))
    stem = stem_of(config)
    single, index = path / f"{stem}.safetensors", path / index_of(stem)
    if is_adapter(config):
        if single.exists():
            return [single]
        raise CheckpointError(f"{path} holds no {single.name}: save the adapter as safetensors")
    if (path / ADAPTER).exists():
        raise CheckpointError(
            f"{path} holds an adapter ({ADAPTER}), which transformers adds to the weights: "
            "merge it into the model first"
        )
    if single.exists():  # goes first, as in transformers
        return [single]
    if index.exists():
        return [path / file for file in sorted(set(_weight_map(index).values()))]
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{path} holds only pickled weights ({pickles[0]}), which can run code when read: "
            "save the model as safetensors first"
        )
    raise CheckpointError(f"{path} holds no {single.name} and no {index.name}: it has no weights")


def stem_of(config: Mapping[str, Any]) -> str:
    """How the files of a model's weights begin: those of adapters and of diffusers' models have other names."""
    if is_adapter(config):
        return ADAPTER_STEM
    return _DIFFUSERS_STEM if _DIFFUSERS_CLASS in config and "model_type" not in config else WEIGHTS


def index_of(stem: str) -> str:
    """The name of the file that says in which shard each tensor is."""
    return f"{stem}.safetensors.index.json"


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no weight_map: restore the file")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{index} names {file!r}, which is no file beside it: restore the index")
    return weight_map
