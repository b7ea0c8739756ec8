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


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a folder holds: dense, sliced or packed; its sizes in bytes on disk; its sites.

    Args:
        path: folder of a checkpoint.

    Returns:
        `kind`, `codec`, `entropy`, `bytes` {`dense`, `dense_untied`, `sliced`, `packed`, `corrections`}, `sites`.
        A size that the folder does not tell is None. `dense` is the file the model was made from, `dense_untied`
        the same with a head of its own, as the paper counts.

    Raises:
        CheckpointError: the folder is no sound checkpoint. Headers are read, not the tensors: see `verify`.
    """
    checkpoint = Checkpoint(path)
    sizes: dict[str, int | None] = dict.fromkeys(("dense", "dense_untied", "sliced", "packed", "corrections"))
    facts: dict[str, Any] = {"kind": "dense", "codec": None, "entropy": None, "bytes": sizes, "sites": []}
    on_disk = bytes_on_disk(path)
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
