"""Count bytes. Everything that states a size asks here."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from freebits.architecture import Architecture
from freebits.checkpoint import Checkpoint
from freebits.packed.format import MANIFEST


def bytes_on_disk(path: str | os.PathLike[str]) -> int:
    """What a model's folder needs to be loaded: weights, index, manifest, `config.json`.

    The tokenizer and the model card are left out, as they are the same in every form of the model.
    """
    files = (*Checkpoint(path).weight_files, *(Path(path) / name for name in ("config.json", MANIFEST)))
    return sum(file.stat().st_size for file in files if file.is_file())


def dense_bytes(dense: Checkpoint, architecture: Architecture) -> dict[str, int]:
    """The two baselines: `dense`, the files as they are, and `dense_untied`, the paper's, with a head of its own."""
    on_disk = bytes_on_disk(dense.path)
    shared = architecture.tied and architecture.head not in dense.files and architecture.embedding in dense.files
    return {"dense": on_disk, "dense_untied": on_disk + (dense.n_bytes[architecture.embedding] if shared else 0)}


def recorded_baselines(config: Mapping[str, Any]) -> dict[str, int | None]:
    """The baselines that slicing wrote into `config.json`; None where there are none."""
    slicing = config.get("slicing")
    recorded = slicing.get("bytes") if isinstance(slicing, dict) else None
    sizes = recorded if isinstance(recorded, dict) else {}
    known = {key: sizes.get(key) for key in ("dense", "dense_untied")}
    return {key: size if isinstance(size, int) and size > 0 else None for key, size in known.items()}


def change(n_bytes: int | None, baseline: int | None) -> float | None:
    """Percent by which `n_bytes` differs from `baseline`; negative is smaller."""
    return 100 * (n_bytes / baseline - 1) if n_bytes and baseline else None
