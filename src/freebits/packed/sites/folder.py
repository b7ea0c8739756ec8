"""A sliced model's packed folder: written block by block, read site by site (paper, Algorithms 5 and 6)."""

import json
import os
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freebits.architecture import Architecture
from freebits.checkpoint import Checkpoint, CheckpointWriter, carry_over
from freebits.errors import CheckpointError
from freebits.packed.format import DTYPES, FORMAT, MANIFEST, PLAIN, Manifest, SiteRecord, is_packed
from freebits.packed.parallel import ordered_map, workers
from freebits.packed.sites.codecs import SITE_CODECS
from freebits.packed.sites.plan import Codec, Plan
from freebits.packed.sites.shortcuts import RANKS, Shortcuts, SlicedModel, shortcut_ranks
from freebits.packed.storage import Kind, StoredTensors, bytes_of, digest
from freebits.progress import Progress


def pack_sites(
    codec: Codec, source: Checkpoint, directory: Path, entropy: bool, jobs: int | None, progress: Progress
) -> dict[str, Any]:
    """Write a sliced model with its sites encoded; returns what the manifest says of the contents.

    Raises:
        CheckpointError: the model is not sliced, or not in a dtype that the codec knows.
    """
    plan = _plan(source, DTYPES[codec.name])
    sublayers = [sublayer for block in plan.architecture.blocks for sublayer in block]
    names = [*plan.sliced.shapes, *(name for sublayer in sublayers for name in codec.part_names(sublayer))]
    carry_over(source.path, directory)
    digests: dict[str, str] = {}
    coded: dict[str, str] = {}
    sites: list[SiteRecord] = []
    with CheckpointWriter.like(source, directory, names) as writer:
        for records, tensors in plan.run(codec, entropy, jobs, progress):
            sites += records
            for name, stored in tensors.items():
                writer.write(name, stored.tensor)
                digests[name] = stored.digest
                coded |= {name: str(stored.kind)} if stored.kind else {}
    config = {key: value for key, value in source.config.items() if key != RANKS}
    config |= shortcut_ranks(plan.architecture, sites) | {"packed": {"format": FORMAT, "codec": codec.name}}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    dtype = str(plan.dtype).removeprefix("torch.")
    return {"dtype": dtype, "threshold": codec.threshold, "sites": sites, "tensors": digests, "coded": coded}


def _plan(sliced: Checkpoint, dtypes: tuple[str, ...]) -> Plan:
    architecture = Architecture.of(sliced.config)
    if sliced.config["model_type"] != architecture.family.sliced_model_type:
        raise CheckpointError(f"{sliced.path} is a dense model, whose shortcuts leave no rotation free: slice it first")
    model = SlicedModel(sliced, architecture)
    names = [str(dtype).removeprefix("torch.") for dtype in model.dtypes]
    if len(names) != 1 or names[0] not in dtypes:
        raise CheckpointError(
            f"{sliced.path}: weights are {' and '.join(sorted(names))}; this codec needs them all in one dtype of "
            f"{', '.join(dtypes)}: slice with --dtype"
        )
    return Plan.of(model, architecture, model.dtypes.pop())


class PackedCheckpoint:
    """A packed directory, validated as far as its headers go; tensors are checked as they are read.

    Raises:
        CheckpointError: the directory is not packed, or a file is missing, damaged or not what the manifest says; of a
            tensor that is noticed when it is read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        Checkpoint(path)
        if not is_packed(path):
            raise CheckpointError(f"{path} holds no {MANIFEST}: it is not a packed checkpoint")
        self.manifest = Manifest.read(self.path)
        if self.manifest.codec == "none":
            raise CheckpointError(f"{path} was packed with codec none: unpack it first")
        try:
            kinds = {name: Kind.parse(kind) for name, kind in self.manifest.coded.items()}
        except ValueError as error:
            raise self._broken(MANIFEST, str(error)) from None
        self.stored = StoredTensors(path, kinds)
        for name in sorted(self.stored.files.keys() ^ self.manifest.tensors.keys()):
            raise self._broken(name, "is in the manifest or in a file, but not in both")
        self._sites = {site.name: site for site in self.manifest.sites if site.codec != PLAIN}
        self._owner = self._owners()
        for site in self._sites.values():
            self._check(site)
        architecture = Architecture.of(self.stored.config)
        self.shortcuts = Shortcuts(self.stored.config, architecture)
        architecture.check(self.shortcuts.dense_shapes(self.shapes), self.stored.config.get("site_sizes", ()))

    @property
    def dtype(self) -> torch.dtype:
        """Of the words."""
        dtype: torch.dtype = getattr(torch, self.manifest.dtype)
        return dtype

    def read(self, name: str) -> Tensor:
        """One stored tensor, its digest checked."""
        try:
            tensor = self.stored[name]
        except ValueError as error:
            raise self._broken(name, f"cannot be decoded ({error})") from None
        if digest(Kind.of(tensor), bytes_of(tensor)) != self.manifest.tensors[name]:
            raise self._broken(name, "does not match its digest")
        return tensor

    def parts(self, site: SiteRecord) -> dict[str, str]:
        """Names under which an encoded site's parts are stored, those that it has."""
        parts = SITE_CODECS[site.codec].parts(site)
        return {part: name for part, name in parts.items() if name in self.stored.files}

    def decode_site(self, site: SiteRecord) -> dict[str, Tensor]:
        """The tensors of one encoded site, from this site's own parts alone."""
        parts = {part: self.read(name) for part, name in self.parts(site).items()}
        try:
            return SITE_CODECS[site.codec].decode(site, parts)
        except ValueError as error:
            raise self._broken(site.name, f"cannot be decoded ({error})") from None

    @property
    def units(self) -> list[str]:
        """What is decoded in one go: each encoded site, by its name, and each plain tensor."""
        return list(dict.fromkeys(self._owner.get(name, name) for name in self.stored.files))

    def mapped(self, jobs: int | None = None) -> Iterator[dict[str, Tensor]]:
        """The model's tensors as it runs; what is stored as it is is mapped, not read, so its digest is not checked."""
        mapped = {name for name in self.units if name not in self._sites and name not in self.stored.coded}
        yield {name: self.stored[name] for name in mapped}
        with workers(jobs) as executor:
            yield from ordered_map(executor, self._decode_unit, [name for name in self.units if name not in mapped])

    def decode(self, jobs: int | None = None, *, dense_shortcuts: bool = False) -> Iterator[dict[str, Tensor]]:
        """The model's tensors, as it runs or with dense shortcuts: one plain tensor or one site at a time."""

        def decoded(name: str) -> dict[str, Tensor]:
            tensors = self._decode_unit(name)
            if not dense_shortcuts:
                return tensors
            dense = ((self.shortcuts.dense_name(n), self.shortcuts.dense(n, t).to(t.dtype)) for n, t in tensors.items())
            return dict(dense)

        with workers(jobs) as executor:
            yield from ordered_map(executor, decoded, self.units)

    def tensors(self, jobs: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of everything; shortcuts that are stored as factors stay factors, as the model runs them."""
        for tensors in self.decode(jobs):
            yield from tensors.items()

    def check(self, jobs: int | None = None) -> None:
        """Decode everything, each digest checked."""
        for _ in self.decode(jobs):
            pass

    def unpack(self, directory: Path, jobs: int | None, progress: Progress) -> None:
        """Write the sliced model, its shortcuts dense, into a new folder."""
        config = {key: value for key, value in self.stored.config.items() if key not in ("packed", RANKS)}
        carry_over(self.path, directory, but=[MANIFEST])
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        total = len(self.units)
        with CheckpointWriter.like(self.stored, directory, map(self.shortcuts.dense_name, self.shapes)) as writer:
            for done, tensors in enumerate(self.decode(jobs, dense_shortcuts=True), start=1):
                for name, tensor in tensors.items():
                    writer.write(name, tensor)
                progress(done, total)

    def _decode_unit(self, name: str) -> dict[str, Tensor]:
        return self.decode_site(self._sites[name]) if name in self._sites else {name: self.read(name)}

    def _owners(self) -> dict[str, str]:
        """Stored tensor → the encoded site it is a part of."""
        owners: dict[str, str] = {}
        decoded: set[str] = set()
        for site in self._sites.values():
            if site.codec not in SITE_CODECS:
                raise self._broken(site.name, f"has codec {site.codec!r}, which is not known")
            parts = set(SITE_CODECS[site.codec].parts(site).values())
            names = [name for name, _ in site.tensors]
            others = {name for name in names if name not in parts} & self.stored.files.keys()
            if parts & owners.keys() or others or len(names) != len(set(names)) or decoded & set(names):
                raise self._broken(site.name, "has a tensor that is stored twice")
            owners |= dict.fromkeys(parts, site.name)
            decoded |= set(names)
        return owners

    def _check(self, site: SiteRecord) -> None:
        """Whether an encoded site's parts have the sizes that its record implies."""
        codec = SITE_CODECS[site.codec]
        shapes, dtypes = self.stored.shapes, self.stored.dtypes
        stored = self.parts(site)
        for part, name in codec.parts(site).items():
            if part not in stored and part not in codec.optional:
                raise self._broken(name, "is missing")
        try:
            expected = codec.expected(site, {part: shapes[name] for part, name in stored.items()})
        except (ValueError, IndexError) as error:
            raise self._broken(site.name, f"cannot be as the manifest says ({error})") from None
        for part, name in stored.items():
            shape, of_words = expected[part]
            if shapes[name] != shape or dtypes[name] != (self.dtype if of_words else torch.uint8):
                raise self._broken(name, "has another size or dtype than the manifest implies")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that are decoded."""
        shapes = {name: shape for name, shape in self.stored.shapes.items() if name not in self._owner}
        for site in self._sites.values():
            shapes |= {name: tuple(shape) for name, shape in site.tensors}
        return shapes

    @property
    def n_parameters(self) -> int:
        """Numbers of the model as it runs."""
        return sum(map(prod, self.shapes.values()))

    def _broken(self, name: str, finding: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {name} {finding}: the file is damaged, download it again")
