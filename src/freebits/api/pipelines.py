"""Process a pipeline, one model at a time. A pipeline is a folder of several models, for example for diffusion."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from freebits.packed.manifest import is_packed
from freebits.storage.auxiliary_files import copy_auxiliary_files
from freebits.storage.checkpoint import CONFIG
from freebits.storage.staging import new_directory

INDEX = "model_index.json"
"""Name of the file that lists the models of a pipeline."""


def is_pipeline(path: str | os.PathLike[str]) -> bool:
    """Return whether a folder contains a pipeline."""
    with suppress(OSError):  # for example, because the name is too long
        return (Path(path) / INDEX).is_file() and not (Path(path) / CONFIG).exists()
    return False


def components(path: str | os.PathLike[str]) -> list[str]:
    """Return the sorted names of the subfolders that contain a model with weights."""
    folders = (folder for folder in sorted(Path(path).iterdir()) if (folder / CONFIG).is_file())
    return [folder.name for folder in folders if is_packed(folder) or any(folder.glob("*.safetensors"))]


def for_each(
    path: str | os.PathLike[str], out: str | os.PathLike[str], process: Callable[[Path, Path], dict[str, Any]]
) -> dict[str, Any]:
    """Process each model of a pipeline, copy the other files, and write a new pipeline.

    Args:
        path: folder of the pipeline.
        out: folder to create; if the function fails, no such folder is left.
        process: function of the old and the new folder of a model, which processes the model.

    Returns:
        `kind`, which is `pipeline`, and `components`: name of a model → result of `process`.

    Raises:
        CheckpointError: `out` already exists, or `process` raises this error.
    """
    source, names = Path(path), components(path)
    with new_directory(out) as directory:
        results = {name: process(source / name, directory / name) for name in names}
        weights = {str(file.relative_to(source)) for name in names for file in (source / name).rglob("*")}
        copy_auxiliary_files(source, directory, weights, exact=True)
    return {"kind": "pipeline", "components": results}
