"""The base of a folder that is being packed."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from freebits.codecs.delta import are_partners
from freebits.errors import CheckpointError
from freebits.limits import BASES
from freebits.packed.base import Base, BaseTensor
from freebits.packed.manifest import digest
from freebits.packed.reader import PackedFolder, open_folder
from freebits.storage.checkpoint import Folder
from freebits.storage.hub import local_folder
from freebits.types import TensorSpec, bytes_of


@dataclass(frozen=True)
class OpenBase:
    """A base and its folder.

    Attributes:
        base: the base, without tensors.
        folder: its folder.
    """

    base: Base
    folder: Folder

    @classmethod
    def open(cls, model: str | os.PathLike[str], out: Path) -> "OpenBase":
        """Open the base that a user calls `model`, for a packed folder at `out`.

        Raises:
            CheckpointError: `model` is not a sound checkpoint, or needs too many bases itself.
        """
        path = local_folder(model)
        folder = open_folder(path, n_bases=BASES - 1)
        inner = folder
        for _ in range(BASES):
            if not isinstance(inner, PackedFolder) or inner.manifest.base is None:
                return cls(Base.of(model, path, out), folder)
            inner = inner.base
        raise CheckpointError(f"{model} needs {BASES} bases, but a base can need only {BASES - 1}: choose another base")

    def partners(self, specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """Return name → spec of the base's tensors with which the code `delta` can compare tensors of the same names.

        Tensors of a packed base that another machine may decode differently are left out.
        """
        folder = self.folder
        return {
            name: folder.specs[name]
            for name, spec in specs.items()
            if name in folder.specs
            and are_partners(spec, folder.specs[name])
            and (not isinstance(folder, PackedFolder) or folder.is_reproducible(name))
        }

    def __getitem__(self, name: str) -> tuple[BaseTensor, Tensor]:
        """Read a tensor of the base."""
        tensor, spec = self.folder[name], self.folder.specs[name]
        return BaseTensor(name, spec, digest(spec, bytes_of(tensor))), tensor
