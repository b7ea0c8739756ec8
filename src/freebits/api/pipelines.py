"""Folders of several models, such as diffusion pipelines: each model is treated alone, other files are copied."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from freebits.packed.manifest import is_packed
from freebits.storage.auxiliary_files import carry_over
from freebits.storage.folder import CONFIG
from freebits.storage.staging import new_directory

INDEX = "model_index.json"
"""The file that names the models of a pipeline."""


def is_pipeline(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a pipeline."""
    with suppress(OSError):  # a name too long, for instance
        return (Path(path) / INDEX).is_file() and not (Path(path) / CONFIG).exists()
    return False


def components(path: str | os.PathLike[str]) -> list[str]:
    """The subfolders that hold a model with weights, by name."""
    folders = (folder for folder in sorted(Path(path).iterdir()) if (folder / CONFIG).is_file())
    return [folder.name for folder in folders if is_packed(folder) or any(folder.glob("*.safetensors"))]


def for_each(
    path: str | os.PathLike[str], out: str | os.PathLike[str], act: Callable[[Path, Path], dict[str, Any]]
) -> dict[str, Any]:
    """Make a new folder of a pipeline; it appears complete or not at all.

    Args:
        path: the pipeline.
        out: the folder.
        act: makes the new folder of a model from its folder.

    Returns:
        `spec`, which is `pipeline`, and `components`: name → what `act` says.

    Raises:
        CheckpointError: `out` exists, or `act` says so.
    """
    source, names = Path(path), components(path)
    with new_directory(out) as directory:
        made = {name: act(source / name, directory / name) for name in names}
        weights = {str(file.relative_to(source)) for name in names for file in (source / name).rglob("*")}
        carry_over(source, directory, weights, exact=True)
    return {"kind": "pipeline", "components": made}
