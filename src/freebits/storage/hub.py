"""Download models from the Hugging Face hub into the cache of huggingface_hub, and upload folders."""

import os
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from freebits.errors import CheckpointError, reason_of
from freebits.storage.remote import mirror, url_of

_UNWANTED = [
    *("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib", "*.npz", "*.npy"),
    *("consolidated*", "original/*", "metal/*", "onnx/*", "openvino/*", "coreml/*"),
    *("*.gguf", "*.h5", "*.msgpack", "*.onnx*", "*.tflite", "*.ot"),
]
"""Files that are not downloaded: pickles, and copies of the weights in other formats."""


def local_folder(
    model: str | os.PathLike[str], revision: str | None = None, *, config_only: bool = False, whole: bool = True
) -> Path:
    """Return the local folder of a model. Download models from the hub, and create local mirrors of models at URLs.

    Args:
        model: a folder, a hub id such as `Qwen/Qwen3-0.6B`, or a URL that fsspec supports, such as `s3://bucket/model`.
            For a hub id, the settings of huggingface_hub determine the endpoint, the token and the cache.
        revision: branch, tag or commit on the hub.
        config_only: whether to download only `config.json`.
        whole: whether to download the weights of a hub model. If not, the result is a mirror, whose weights are read
            from the hub by range.

    Raises:
        CheckpointError: a hub id or a URL does not exist or cannot be reached. A folder is not checked.
    """
    if url := url_of(model):
        return mirror(url)
    path = Path(model)
    if os.fspath(model).startswith(".") or not _is_hub_id(path):
        return path
    try:
        if not whole:
            return mirror(f"hf://{path.as_posix()}" + (f"@{revision}" if revision else ""))
        patterns = ["config.json"] if config_only else None
        return Path(
            snapshot_download(path.as_posix(), revision=revision, allow_patterns=patterns, ignore_patterns=_UNWANTED)
        )
    except CheckpointError:
        raise
    except Exception as error:  # the exception types of huggingface_hub change between versions
        reason = reason_of(error, 160)
        raise CheckpointError(
            f"{model} is not a folder and cannot be downloaded from the hub ({reason}): check the name, the connection "
            "and HF_TOKEN"
        ) from None


def push(folder: Path, repo: str) -> str:
    """Upload a folder to a repository on the hub, and return the URL of the commit. A new repository is private.

    Raises:
        CheckpointError: the upload fails.
    """
    try:
        api = HfApi()
        api.create_repo(repo, exist_ok=True, private=True)
        return str(api.upload_folder(folder_path=folder, repo_id=repo, commit_message="Made by freebits").commit_url)
    except Exception as error:
        reason = reason_of(error, 160)
        raise CheckpointError(
            f"{folder} is finished but cannot be uploaded to {repo} ({reason}): check HF_TOKEN and upload the folder "
            "yourself"
        ) from None


def _is_hub_id(path: Path) -> bool:
    """Return whether a path has two names, as hub ids have, and neither the path nor its parent exists locally."""
    two_names = len(path.parts) == 2 and not any(part.startswith((".", "~")) for part in path.parts)
    try:
        return two_names and not path.exists() and not path.is_absolute() and not path.parent.exists()
    except OSError:
        return False
