"""Say what a checkpoint folder holds and how large it is."""

import os
from math import prod
from pathlib import Path
from typing import Any

from freebits.architecture import Architecture
from freebits.checkpoint import Checkpoint
from freebits.errors import CheckpointError, UnsupportedModelError
from freebits.packed.format import Manifest, is_packed
from freebits.packed.size import bytes_on_disk, dense_bytes, recorded_baselines
from freebits.packed.unpacking import open_packed


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a folder holds: dense, sliced or packed; its sizes in bytes on disk; its sites.

    Args:
        path: folder of a checkpoint.

    Returns:
        `kind`, `codec`, `entropy`, `bytes` {`dense`, `dense_untied`, `sliced`, `packed`, `corrections`}, `sites`;
        `groups`, bytes on disk by what they are for, which add up to all; `bits_per_parameter` of the model as it runs.
        A size that the folder does not tell is None. `dense` is the file the model was made from, `dense_untied`
        the same with a head of its own, as the paper counts.

    Raises:
        CheckpointError: the folder is no sound checkpoint. Headers are read, not the tensors: see `verify`.
    """
    checkpoint = Checkpoint(path)
    sizes: dict[str, int | None] = dict.fromkeys(("dense", "dense_untied", "sliced", "packed", "corrections"))
    facts: dict[str, Any] = {"kind": "dense", "codec": None, "entropy": None, "bytes": sizes, "sites": []}
    on_disk = bytes_on_disk(path)
    facts["groups"] = _groups(checkpoint, on_disk)
    facts["bits_per_parameter"] = 8 * on_disk / max(1, _n_parameters(checkpoint))
    if is_packed(path):
        manifest = Manifest.read(Path(path))
        corrections = [shape for name, shape in checkpoint.shapes.items() if name.endswith(".corrections")]
        sizes |= manifest.bytes | {"packed": on_disk, "corrections": sum(map(prod, corrections))}
        facts |= {"kind": "packed", "codec": manifest.codec, "entropy": manifest.entropy}
        facts["sites"] = [site.facts for site in manifest.sites]
    elif "site_sizes" in checkpoint.config:
        sizes |= recorded_baselines(checkpoint.config) | {"sliced": on_disk}
        facts["kind"] = "sliced"
    else:
        try:
            sizes |= dense_bytes(checkpoint, Architecture.of(checkpoint.config))
        except (UnsupportedModelError, CheckpointError):  # whatever it is, this is its size
            sizes["dense"] = on_disk
    return facts


def _groups(checkpoint: Checkpoint, on_disk: int) -> dict[str, int]:
    """Bytes on disk by what they are for: a sort of layer, side data, or everything around the tensors."""
    groups: dict[str, int] = {}
    kinds = _kinds(checkpoint)
    for name, n_bytes in checkpoint.n_bytes.items():
        kind = next((kind for module, kind in kinds.items() if name.startswith(f"{module}.")), "other tensors")
        kind = "side data" if name.endswith((".signs", ".corrections")) else kind
        groups[kind] = groups.get(kind, 0) + n_bytes
    return groups | {"headers, manifest, config": on_disk - sum(groups.values())}


def _kinds(checkpoint: Checkpoint) -> dict[str, str]:
    """Module → what it is; empty for an architecture that is not known."""
    try:
        architecture = Architecture.of(checkpoint.config)
    except (UnsupportedModelError, CheckpointError):
        return {}
    family = architecture.family
    kinds = dict.fromkeys(family.embeddings, "embeddings") | {family.head: "head", family.final_norm: "head"}
    for block in architecture.blocks:
        for names, sub in zip(family.sublayers, block, strict=True):
            kinds |= dict.fromkeys((sub.norm, *sub.reads, sub.write, sub.prefix), names.name)
            kinds[sub.shortcut] = "shortcuts"
    return kinds


def _n_parameters(checkpoint: Checkpoint) -> int:
    """Numbers of the model as it runs."""
    if is_packed(checkpoint.path):
        return open_packed(checkpoint.path).n_parameters
    return sum(map(prod, checkpoint.shapes.values()))
