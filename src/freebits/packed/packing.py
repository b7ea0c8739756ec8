"""Pack a sliced checkpoint with the bits-back code, one block in memory at a time (paper, Algorithm 5)."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor

from freebits.architecture import Architecture, Axis, Sublayer
from freebits.checkpoint import Checkpoint, CheckpointWriter, carry_over, new_directory
from freebits.coding import Declined, canonical_direction, encode
from freebits.errors import CheckpointError, UsageError
from freebits.packed.format import FORMAT, Manifest, SiteRecord, digest, digest_of_file, is_packed
from freebits.packed.inspection import inspect
from freebits.packed.parallel import ordered_map, workers
from freebits.packed.size import bytes_on_disk, recorded_baselines
from freebits.progress import Progress, silent
from freebits.symmetry import rotate

CODEC = "bits-back"
THRESHOLD = 0.01

Axes = Mapping[str, tuple[Axis, ...]]


def pack(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    threshold: float = THRESHOLD,
    jobs: int | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Pack a sliced checkpoint: keep its function, take the bits of its rotations back.

    Function-preserving: every decoded weight is within `threshold` of the rotated one, most are far closer.

    Args:
        model: folder of a sliced checkpoint.
        out: folder to create; it appears complete or not at all.
        threshold: largest error of a decoded word that is left without a correction. The paper uses 0.01 for
            OPT and 0.005 for Llama 2.
        jobs: blocks to work on at once, by default one a processor, at most four. Memory holds as many and one
            embedding.
        progress: called after each block.

    Returns:
        What `inspect(out)` says.

    Raises:
        UsageError: the threshold is negative or `jobs` is less than one.
        CheckpointError: the model is not a sound sliced checkpoint in 16-bit floats, or `out` exists.
    """
    if not 0 <= threshold < math.inf:
        raise UsageError(f"threshold {threshold}: give a number of 0 or more")
    sliced = Checkpoint(model)
    if is_packed(model):
        raise CheckpointError(f"{model} is packed already: unpack it first")
    packing = _Packing.of(sliced, threshold)
    with new_directory(out) as directory:
        carry_over(sliced.path, directory)
        config = sliced.config | {"packed": {"format": FORMAT, "codec": CODEC}}
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        manifest = Manifest(
            codec=CODEC,
            entropy="none",
            threshold=threshold,
            dtype=str(packing.dtype).removeprefix("torch."),
            bytes=recorded_baselines(sliced.config) | {"sliced": bytes_on_disk(sliced.path)},
            sites=[],
            tensors={},
            config=digest_of_file(directory / "config.json"),
        )
        digests: dict[str, str] = {}
        sites: list[SiteRecord] = []
        with CheckpointWriter.like(sliced, directory, packing.possible_names()) as writer:
            for records, tensors in packing.run(jobs, progress):
                sites += records
                for name, tensor in tensors.items():
                    writer.write(name, tensor)
                    digests[name] = digest(tensor)
        manifest.complete(sites, digests).write(directory)
    return inspect(out)


@dataclass(frozen=True)
class _Packing:
    """The plan: which tensors are rotated, in which dtype, and which sites are left alone."""

    sliced: Checkpoint
    architecture: Architecture
    dtype: torch.dtype
    threshold: float
    unsound: dict[int, str]
    """Sites at which no rotation can be applied, with the reason."""

    @classmethod
    def of(cls, sliced: Checkpoint, threshold: float) -> "_Packing":
        architecture = Architecture.of(sliced.config)
        if sliced.config["model_type"] != architecture.family.sliced_model_type:
            raise CheckpointError(
                f"{sliced.path} is a dense model, whose shortcuts leave no rotation free: slice it first"
            )
        architecture.check(sliced.shapes, sliced.config.get("site_sizes", ()))
        dtypes = {sliced.dtypes[name] for name in architecture.axes if name in sliced.files}
        if len(dtypes) != 1 or (dtype := dtypes.pop()).itemsize != 2 or not dtype.is_floating_point:
            raise CheckpointError(
                f"{sliced.path}: bits-back needs all weights in float16 or all in bfloat16: slice with --dtype"
            )
        return cls(sliced, architecture, dtype, threshold, _unsound_sites(sliced, architecture))

    def possible_names(self) -> list[str]:
        """Every tensor that may be written."""
        sublayers = [sublayer for block in self.architecture.blocks for sublayer in block]
        parts = [f"{sub.prefix}.{part}" for sub in sublayers for part in ("message", "signs", "corrections")]
        return [*self.sliced.files, *parts]

    def run(self, jobs: int | None, progress: Progress) -> Iterator[tuple[list[SiteRecord], dict[str, Tensor]]]:
        """Site records and tensors to write: the embeddings, then each block's, then the head's."""
        architecture, blocks = self.architecture, self.architecture.blocks
        yield [], self._read(architecture.embedding_axes)
        parts = [({name: axes for sub in block for name, axes in sub.axes.items()}, block) for block in blocks]
        with workers(jobs) as executor:
            gauges = chain([{}], ordered_map(executor, self._gauge, blocks), [{}])
            rotations = (before | after for before, after in pairwise(gauges))
            work = zip([*parts, (architecture.head_axes, ())], rotations, strict=True)
            for done, coded in enumerate(ordered_map(executor, self._encode_part, work), start=1):
                yield coded
                progress(done, len(parts) + 1)

    def _gauge(self, block: tuple[Sublayer, ...]) -> dict[int, Tensor]:
        """The rotations that take a block's output matrices to their canonical direction (Algorithm 1)."""
        sound = (sublayer for sublayer in block if sublayer.site not in self.unsound)
        return {sub.site: canonical_direction(self.sliced[f"{sub.write}.weight"].double().T) for sub in sound}

    def _encode_part(
        self, work: tuple[tuple[Axes, tuple[Sublayer, ...]], dict[int, Tensor]]
    ) -> tuple[list[SiteRecord], dict[str, Tensor]]:
        """Rotate a block, or the head, to its canonical direction and encode its sites."""
        (axes, sublayers), rotations = work
        outputs = {f"{sublayer.write}.weight" for sublayer in sublayers}  # rounded after one more rotation
        dtypes = {name: torch.float64 if name in outputs else self.dtype for name in axes}
        tensors = {n: rotate(t, axes[n], rotations, dtypes[n]) for n, t in self._read(axes).items()}
        return [self._encode_site(sublayer, tensors) for sublayer in sublayers], tensors

    def _encode_site(self, sub: Sublayer, tensors: dict[str, Tensor]) -> SiteRecord:
        """Replace a site's tensors by its code, or leave them as they are."""
        names = [f"{module}.weight" for module in (sub.shortcut, *sub.reads)]
        output = f"{sub.write}.weight"
        W = tensors[output].T
        tensors[output] = tensors[output].to(self.dtype)
        if sub.site in self.unsound:
            return SiteRecord(sub.site, sub.prefix, "plain", reason=self.unsound[sub.site])
        try:
            coded = encode(torch.cat([tensors[name].flatten() for name in names]), W, self.threshold)
        except Declined as reason:
            return SiteRecord(sub.site, sub.prefix, "plain", reason=str(reason))
        record = SiteRecord(
            sub.site,
            sub.prefix,
            CODEC,
            message=[(name, list(tensors.pop(name).shape)) for name in names],
            output=(output, list(tensors[output].shape)),
            corrections=coded.n_corrections,
        )
        tensors[output] = coded.matrix.T
        parts = {"message": coded.message, "signs": coded.signs, "corrections": coded.corrections}
        tensors |= {record.parts[part]: tensor for part, tensor in parts.items() if len(tensor)}
        return record

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self.sliced[name] for name in names if name in self.sliced.files}


def _unsound_sites(sliced: Checkpoint, architecture: Architecture) -> dict[int, str]:
    """Sites with a tensor that some rotation would take beyond its dtype, or that is not finite already."""
    unsound: dict[int, str] = {}
    for name in filter(architecture.axes.get, sliced.files):
        tensor, axes = sliced[name], architecture.axes[name]
        length = torch.linalg.vector_norm(tensor, dim=[axis.dim for axis in axes], dtype=torch.float64)
        if not (length < torch.finfo(tensor.dtype).max).all():
            unsound |= {axis.site: f"{name} is not finite or could overflow when rotated" for axis in axes}
    return unsound
