"""The base of a packed folder: another model. Recipes take tensors of the base, which the folder does not store."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from freebits.errors import CheckpointError
from freebits.execution.serialization import storable
from freebits.storage.checkpoint import config_name
from freebits.storage.hub import local_folder
from freebits.storage.remote import url_of
from freebits.types import TensorSpec

BASE_PATH = "FREEBITS_BASE_PATH"
"""The environment variable with the folders in which bases are looked for, separated as in `PATH`."""
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@storable
@dataclass(frozen=True)
class BaseTensor:
    """A tensor of the base.

    Attributes:
        name: its name in the base.
        spec: its dtype and shape.
        digest: its digest; see `freebits.packed.manifest.digest`.
    """

    name: str
    spec: TensorSpec
    digest: str


@dataclass(frozen=True)
class Base:
    """The base of a packed folder.

    Attributes:
        model: id on the hub, path relative to the packed folder, or a text for people, such as a URL.
        revision: commit on the hub; None if `model` is not an id on the hub.
        tensors: name by which a recipe takes a tensor → the tensor.
    """

    model: str
    revision: str | None = None
    tensors: Mapping[str, BaseTensor] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, Any]:
        """The base as JSON."""
        tensors = {name: [tensor.name, str(tensor.spec), tensor.digest] for name, tensor in self.tensors.items()}
        return {"model": self.model, "revision": self.revision, "tensors": tensors}

    @classmethod
    def parse(cls, facts: Mapping[str, Any]) -> "Base":
        """Return the base that `facts` describes.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: `facts` does not describe a base.
        """
        tensors = {
            name: BaseTensor(base_name, TensorSpec.parse(spec), digest)
            for name, (base_name, spec, digest) in facts["tensors"].items()
        }
        model, revision = facts["model"], facts["revision"]
        texts = [model, *(text for tensor in tensors.values() for text in (tensor.name, tensor.digest))]
        if not all(isinstance(text, str) and "\0" not in text for text in texts) or facts.keys() - vars(cls("")).keys():
            raise ValueError("a value of the base is unknown, or is not a string without null characters")
        if revision is not None and not (_COMMIT.fullmatch(revision) and _HUB_ID.fullmatch(model)):
            raise ValueError("the revision of the base is not a commit, or its model is not an id on the hub")
        return cls(model, revision, tensors)

    @classmethod
    def of(cls, model: str | os.PathLike[str], folder: Path, out: Path) -> "Base":
        """Return the base that a user calls `model` and that lies in `folder`, for a packed folder at `out`."""
        revision = folder.name
        if _COMMIT.fullmatch(revision) and _HUB_ID.fullmatch(os.fspath(model)):
            return cls(os.fspath(model), revision)
        if url := url_of(model):
            return cls(url)
        try:
            return cls(Path(os.path.relpath(folder.resolve(), out.resolve())).as_posix())
        except ValueError:  # on Windows, for a folder on another drive
            return cls(folder.resolve().as_posix())

    def locate(self, packed: Path, given: str | os.PathLike[str] | None = None) -> Path:
        """Return the folder of the base: the given one, one in `FREEBITS_BASE_PATH`, or the recorded one.

        Raises:
            CheckpointError: no folder is given, and none is found.
        """
        if given is not None:
            return local_folder(given)
        name = self.model.rsplit("/", 1)[-1]
        for entry in filter(None, os.environ.get(BASE_PATH, "").split(os.pathsep)):
            for folder in (Path(entry) / name, Path(entry)):
                if _is_model(folder):
                    return folder
        if self.revision is not None:
            return local_folder(self.model, self.revision)
        if _is_model(packed / self.model):
            return packed / self.model
        raise CheckpointError(
            f"{packed} needs its base, which was at {self.model} but is not there: set {BASE_PATH} to "
            "the folder of the base"
        )


def _is_model(folder: Path) -> bool:
    try:
        return (folder / config_name(folder)).is_file()
    except (OSError, ValueError):  # for example, because the name is too long
        return False
