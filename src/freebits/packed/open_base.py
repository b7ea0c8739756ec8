"""The base of a folder that is being packed."""

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from freebits.codecs.base import Declined
from freebits.codecs.delta import are_partners
from freebits.errors import CheckpointError
from freebits.limits import BASES
from freebits.packed.base import Base, BaseTensor
from freebits.packed.encoded_piece import Piece, relative
from freebits.packed.manifest import digest
from freebits.packed.reader import PackedFolder, open_folder
from freebits.storage.checkpoint import Folder
from freebits.storage.hub import local_folder
from freebits.types import TensorSpec, bytes_of

_CLEAR_GAIN = 0.5
"""If the differences from the base take at most this fraction of a tensor's bytes, coding it alone is not tried."""


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

    def exact_piece(
        self, name: str, spec: TensorSpec, tensor: Tensor, alone: Callable[[], Piece], used_names: Collection[str] = ()
    ) -> tuple[Piece, dict[str, Tensor]]:
        """Encode a tensor bit for bit, as differences from the base if this saves bytes.

        Args:
            name: name of the tensor.
            spec: its spec.
            tensor: its value, which can be flat bytes.
            alone: function that encodes the tensor without the base.
            used_names: see `relative`.

        Returns:
            The piece, and the tensors of the base that it takes, by the names by which recipes take them.
        """
        if not self.partners({name: spec}):
            return alone(), {}
        base_tensor, values = self[name]
        try:
            piece = relative(name, spec, tensor, base_tensor, values, used_names)
        except Declined:
            return alone(), {}
        if piece.n_bytes > _CLEAR_GAIN * spec.n_bytes and (other := alone()).n_bytes <= piece.n_bytes:
            return other, {}
        return piece, dict.fromkeys(piece.base, values)

    def __getitem__(self, name: str) -> tuple[BaseTensor, Tensor]:
        """Read a tensor of the base."""
        tensor, spec = self.folder[name], self.folder.specs[name]
        return BaseTensor(name, spec, digest(spec, bytes_of(tensor))), tensor
