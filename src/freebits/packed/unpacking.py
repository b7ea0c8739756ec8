"""Read a packed folder, whatever its codec."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from torch import Tensor

from freebits.checkpoint import Checkpoint, new_directory
from freebits.packed.exact import ExactCheckpoint
from freebits.packed.format import is_exact, is_packed
from freebits.packed.sites import PackedCheckpoint
from freebits.progress import Progress, silent


class Packed(Protocol):
    """A packed folder. To open it checks its headers, to read a tensor its digest; both raise `CheckpointError`."""

    @property
    def n_parameters(self) -> int:
        """Numbers of the model as it runs."""

    def tensors(self, jobs: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of everything, decoded as it is asked for, `jobs` at once."""

    def check(self, jobs: int | None = None) -> None:
        """Decode everything."""

    def unpack(self, directory: Path, jobs: int | None, progress: Progress) -> None:
        """Write the plain checkpoint into a new folder."""


def open_packed(path: str | os.PathLike[str]) -> Packed:
    """The packed folder at `path`.

    Raises:
        CheckpointError: the folder is not packed, or a file is missing, damaged or not what the manifest says.
    """
    Checkpoint(path)  # which says why where it is none
    return ExactCheckpoint(path) if is_packed(path) and is_exact(path) else PackedCheckpoint(path)


def unpack(
    packed: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    jobs: int | None = None,
    progress: Progress = silent,
) -> None:
    """Write the plain checkpoint that a packed one holds, for `transformers` and any other tool.

    A sliced model comes back as SliceGPT's, with dense shortcuts; files packed with codec `none` byte for byte.

    Args:
        packed: a packed folder.
        out: folder to create; it appears complete or not at all.
        jobs: sites or tensors to decode at once, by default one a processor, at most four. Memory holds twice as many
            and one embedding.
        progress: called after each site or plain tensor.

    Raises:
        CheckpointError: the folder is not packed or is damaged, or `out` exists.
        UsageError: `jobs` is less than one.
    """
    source = open_packed(packed)
    with new_directory(out) as directory:
        source.unpack(directory, jobs, progress)
