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
"""If the differences take at most this fraction of a tensor's bytes, coding without the base is not tried."""


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
            CheckpointError: `model` or one of its own bases is not a sound checkpoint, or `model` needs too many
                bases.
        """
        path = local_folder(model)
        current = folder = open_folder(path)
        n_bases = 0
        while isinstance(current, PackedFolder) and current.manifest.base is not None:
            n_bases += 1
            if n_bases == BASES:
                raise CheckpointError(
                    f"{model} needs {BASES} or more bases itself, but a base may need at most {BASES - 1}: choose "
                    "another base"
                )
            current = current.base
        return cls(Base.of(model, path, out), folder)

    def partners(self, specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """Return name → the base's spec, for each tensor that `delta` can encode as differences from the base.

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
        self,
        name: str,
        spec: TensorSpec,
        tensor: Tensor,
        encode_alone: Callable[[], Piece],
        used_names: Collection[str] = (),
    ) -> tuple[Piece, dict[str, Tensor]]:
        """Encode a tensor bit for bit, as differences from the base if this saves bytes.

        Args:
            name: name of the tensor.
            spec: its spec.
            tensor: its value, which can be flat bytes.
            encode_alone: function that encodes the tensor without the base.
            used_names: see `relative`.

        Returns:
            The piece, and the tensors of the base that the piece takes, by the names by which recipes take them.
        """
        if not self.partners({name: spec}):
            return encode_alone(), {}
        base_tensor, values = self[name]
        try:
            piece = relative(name, spec, tensor, base_tensor, values, used_names)
        except Declined:
            return encode_alone(), {}
        if piece.n_bytes > _CLEAR_GAIN * spec.n_bytes and (alone := encode_alone()).n_bytes <= piece.n_bytes:
            return alone, {}
        return piece, dict.fromkeys(piece.base, values)

    def __getitem__(self, name: str) -> tuple[BaseTensor, Tensor]:
        """Read a tensor of the base."""
        tensor, spec = self.folder[name], self.folder.specs[name]
        return BaseTensor(name, spec, digest(spec, bytes_of(tensor))), tensor
