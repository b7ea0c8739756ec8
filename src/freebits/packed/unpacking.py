"""Read a packed checkpoint: validate, then decode site by site (paper, Algorithm 6)."""

import json
import os
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from freebits.architecture import Architecture
from freebits.checkpoint import Checkpoint, CheckpointWriter, carry_over, new_directory
from freebits.coding import Coded, decode, message_length, n_words_taken
from freebits.errors import CheckpointError
from freebits.packed.format import MANIFEST, Manifest, SiteRecord, digest, is_packed
from freebits.packed.parallel import ordered_map, workers
from freebits.progress import Progress, silent


class PackedCheckpoint:
    """A packed directory, validated as far as its headers go; tensors are checked as they are read.

    Raises:
        CheckpointError: the directory is not packed, or a file is missing, damaged or not what the manifest says.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.stored = Checkpoint(path)
        if not is_packed(path):
            raise CheckpointError(f"{path} holds no {MANIFEST}: it is not a packed checkpoint")
        self.manifest = Manifest.read(self.path)
        for name in sorted(self.stored.files.keys() ^ self.manifest.tensors.keys()):
            raise self._broken(name, "is in the manifest or in a file, but not in both")
        self._sites = {site.name: site for site in self.manifest.sites if site.codec != "plain"}
        self._owner = {part: site.name for site in self._sites.values() for part in site.parts.values()}
        for site in self._sites.values():
            self._check(site)
        Architecture.of(self.stored.config).check(self._decoded_shapes(), self.stored.config.get("site_sizes", ()))

    @property
    def dtype(self) -> torch.dtype:
        """Of the words."""
        dtype: torch.dtype = getattr(torch, self.manifest.dtype)
        return dtype

    def read(self, name: str) -> Tensor:
        """One stored tensor, its digest checked."""
        tensor = self.stored[name]
        if digest(tensor) != self.manifest.tensors[name]:
            raise self._broken(name, "does not match its digest")
        return tensor

    def decode_site(self, site: SiteRecord) -> dict[str, Tensor]:
        """The tensors of one encoded site, from this site's own parts alone."""
        parts = {part: self.read(name) for part, name in site.parts.items() if name in self.stored.files}
        parts.setdefault("corrections", torch.empty(0, dtype=torch.uint8))
        assert site.output is not None  # noqa: S101  (checked on opening)
        output, (n_columns, _) = site.output
        try:
            message, matrix = decode(Coded(**parts | {"matrix": parts["matrix"].T}), n_columns)
        except ValueError as error:
            raise self._broken(site.name, f"cannot be decoded ({error})") from None
        lengths = [prod(shape) for _, shape in site.message]
        words = zip(site.message, message.split(lengths), strict=True)
        return {name: part.reshape(shape) for (name, shape), part in words} | {output: matrix.T.contiguous()}

    @property
    def units(self) -> list[str]:
        """What is decoded in one go: each encoded site, by its name, and each plain tensor."""
        return list(dict.fromkeys(self._owner.get(name, name) for name in self.stored.files))

    def tensor_names(self) -> list[str]:
        """Names of the sliced model's tensors."""
        return list(self._decoded_shapes())

    def decode(self, jobs: int | None = None) -> Iterator[dict[str, Tensor]]:
        """The sliced model's tensors: one plain tensor, or those of one site, at a time."""
        with workers(jobs) as executor:
            yield from ordered_map(executor, self._decode_unit, self.units)

    def _decode_unit(self, name: str) -> dict[str, Tensor]:
        return self.decode_site(self._sites[name]) if name in self._sites else {name: self.read(name)}

    def _check(self, site: SiteRecord) -> None:
        """Whether an encoded site's parts have the sizes that its record implies."""
        assert site.output is not None  # noqa: S101
        parts, shapes, dtypes = site.parts, self.stored.shapes, self.stored.dtypes
        for part in ("message", "signs", "matrix"):
            if parts[part] not in shapes:
                raise self._broken(parts[part], "is missing")
        _, (n_columns, n_rows) = site.output
        rank = shapes[parts["matrix"]][0] if shapes[parts["matrix"]] else 0
        corrections = shapes.get(parts["corrections"], (0,))
        n_words = sum(prod(shape) for _, shape in site.message)
        sound = (
            0 < rank <= n_columns
            and n_words >= n_words_taken(rank)
            and shapes[parts["signs"]] == (-(-rank // 64) * 8,)
            and len(corrections) == 1
            and corrections[0] % 8 == 0
            and shapes[parts["matrix"]] == (rank, n_rows)
            and shapes[parts["message"]] == (message_length(n_words, rank),)
            and dtypes[parts["message"]] == dtypes[parts["matrix"]] == self.dtype
            and dtypes[parts["signs"]] == dtypes.get(parts["corrections"], torch.uint8) == torch.uint8
        )
        if not sound:
            raise self._broken(site.name, "has parts of other sizes than the manifest implies")

    def _decoded_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the sliced model's tensors."""
        shapes = {name: shape for name, shape in self.stored.shapes.items() if name not in self._owner}
        for site in self._sites.values():
            shapes |= {name: tuple(shape) for name, shape in (*site.message, *filter(None, [site.output]))}
        return shapes

    def _broken(self, name: str, finding: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {name} {finding}: the file is damaged, download it again")


def unpacked_tensors(path: str | os.PathLike[str], jobs: int | None = None) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything in a packed checkpoint, decoded as it is asked for.

    Raises:
        CheckpointError: see `PackedCheckpoint`.
    """
    for tensors in PackedCheckpoint(path).decode(jobs):
        yield from tensors.items()


def unpack(
    packed: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    jobs: int | None = None,
    progress: Progress = silent,
) -> None:
    """Write the plain sliced checkpoint that a packed one holds, for `transformers` and any other tool.

    Args:
        packed: a packed folder.
        out: folder to create; it appears complete or not at all.
        jobs: sites to decode at once, by default one a processor, at most four. Memory holds as many and one
            embedding.
        progress: called after each site or plain tensor.

    Raises:
        CheckpointError: the folder is not packed or is damaged, or `out` exists.
        UsageError: `jobs` is less than one.
    """
    source = PackedCheckpoint(packed)
    config = {key: value for key, value in source.stored.config.items() if key != "packed"}
    with new_directory(out) as directory:
        carry_over(source.path, directory, but=[MANIFEST])
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        n_units = len(source.units)
        with CheckpointWriter.like(source.stored, directory, source.tensor_names()) as writer:
            for done, tensors in enumerate(source.decode(jobs), start=1):
                for name, tensor in tensors.items():
                    writer.write(name, tensor)
                progress(done, n_units)
