"""Folders of several models, such as diffusion pipelines: process each model alone and copy the other files."""

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
"""The file that lists the models of a pipeline."""


def is_pipeline(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a pipeline."""
    with suppress(OSError):  # for example, the name is too long
        return (Path(path) / INDEX).is_file() and not (Path(path) / CONFIG).exists()
    return False


def components(path: str | os.PathLike[str]) -> list[str]:
    """The names of the subfolders that hold a model with weights, sorted."""
    folders = (folder for folder in sorted(Path(path).iterdir()) if (folder / CONFIG).is_file())
    return [folder.name for folder in folders if is_packed(folder) or any(folder.glob("*.safetensors"))]


def for_each(
    path: str | os.PathLike[str], out: str | os.PathLike[str], process: Callable[[Path, Path], dict[str, Any]]
) -> dict[str, Any]:
    """Write a new pipeline by processing each model of another; it appears complete or not at all.

    Args:
        path: folder of the pipeline.
        out: folder to create.
        process: writes the new folder of a model, given its present folder and the new one.

    Returns:
        `kind`, which is `pipeline`, and `components`: name → result of `process`.

    Raises:
        CheckpointError: `out` exists, or `process` raises it.
    """
    source, names = Path(path), components(path)
    with new_directory(out) as directory:
        results = {name: process(source / name, directory / name) for name in names}
        weights = {str(file.relative_to(source)) for name in names for file in (source / name).rglob("*")}
        copy_auxiliary_files(source, directory, weights, exact=True)
    return {"kind": "pipeline", "components": results}
