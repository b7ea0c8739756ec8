"""Models on the hub: what is needed of one is downloaded into the hub's own cache."""

import os
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from freebits.errors import CheckpointError, one_line
from freebits.storage.remote import mirror, url_of

_UNWANTED = [
    *("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib", "*.npz", "*.npy"),
    *("consolidated*", "original/*", "metal/*", "onnx/*", "openvino/*", "coreml/*"),
    *("*.gguf", "*.h5", "*.msgpack", "*.onnx*", "*.tflite", "*.ot"),
]
"""Files that are not downloaded: pickles, and the same weights in other formats."""
_CONFIG_ONLY = ("config.json",)


def located(
    model: str | os.PathLike[str], revision: str | None = None, *, config_only: bool = False, whole: bool = True
) -> Path:
    """The folder of a model, downloaded first where it is an id on the hub, mirrored where it is a URL.

    Args:
        model: a folder; or an id such as `Qwen/Qwen3-0.6B`, with huggingface_hub's endpoint, token and cache; or a URL
            that fsspec knows, such as `s3://bucket/model`.
        revision: branch, tag or commit on the hub.
        config_only: download `config.json` alone.
        whole: download the weights of a model on the hub, too; otherwise they are read by range.

    Raises:
        CheckpointError: there is none, or it cannot be reached.
    """
    if url := url_of(model):
        return mirror(url)
    path = Path(model)
    if os.fspath(model).startswith(".") or not is_id(path):
        return path
    try:
        if not whole:
            return mirror(f"hf://{path.as_posix()}" + (f"@{revision}" if revision else ""))
        wanted = list(_CONFIG_ONLY) if config_only else None
        return Path(
            snapshot_download(path.as_posix(), revision=revision, allow_patterns=wanted, ignore_patterns=_UNWANTED)
        )
    except CheckpointError:
        raise
    except Exception as error:  # of the client's library, too, whose kinds change
        finding = one_line(" ".join(str(error).split()), 160)
        raise CheckpointError(
            f"{model} is no folder, and could not be had from the hub ({finding}): check the name, the connection and "
            "HF_TOKEN"
        ) from None


def push(folder: Path, repo: str) -> str:
    """Upload a folder to the hub, to a repository that is created if need be, private; the address of the commit.

    Raises:
        CheckpointError: the hub does not take it.
    """
    try:
        api = HfApi()
        api.create_repo(repo, exist_ok=True, private=True)
        return str(api.upload_folder(folder_path=folder, repo_id=repo, commit_message="Made by freebits").commit_url)
    except Exception as error:  # as above
        finding = one_line(" ".join(str(error).split()), 160)
        raise CheckpointError(f"{folder} is done, but the hub does not take it as {repo} ({finding})") from None


def is_id(path: Path) -> bool:
    """Whether this, which is no folder here, can be a model's id on the hub: two names with a slash between them."""
    two_names = len(path.parts) == 2 and not any(part.startswith((".", "~")) for part in path.parts)
    try:
        return two_names and not path.exists() and not path.is_absolute() and not path.parent.exists()
    except OSError:
        return False
