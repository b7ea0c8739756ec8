"""Load a model to run it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import freebits.huggingface.modeling  # noqa: F401  (registers the sliced models)
from freebits.architecture import Architecture
from freebits.checkpoint import Checkpoint
from freebits.errors import CheckpointError
from freebits.packed import PackedCheckpoint, is_packed


def load(path: str | os.PathLike[str], *, dtype: torch.dtype | str = "auto", **kwargs: Any) -> Any:
    """The model in a dense, sliced or packed folder, ready to run; a packed one is decoded as it is read.

    Args:
        path: folder of the checkpoint.
        dtype: of the weights in memory; `auto` is the checkpoint's own.
        kwargs: passed on to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        CheckpointError: the folder is no sound checkpoint.
    """
    if is_packed(path):
        PackedCheckpoint(path)
    else:
        checkpoint = Checkpoint(path)
        if "site_sizes" in checkpoint.config:  # transformers would fill in what is missing at random
            Architecture.of(checkpoint.config).check(checkpoint.shapes, checkpoint.config["site_sizes"])
    with understood(path, "model"):
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True, **kwargs)


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer in a checkpoint folder.

    Raises:
        CheckpointError: there is none that transformers can load.
    """
    if not Path(path).is_dir():
        raise CheckpointError(f"{path} is not a folder: give the folder of a downloaded checkpoint")
    with understood(path, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, local_files_only=True)
        return tokenizer


@contextmanager
def understood(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Turn what transformers says of a folder it cannot load into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        lines = str(error).strip().splitlines() or [""]
        finding = f"{type(error).__name__}: {lines[0]}"
        raise CheckpointError(f"{path} holds no {what} that transformers can load ({finding})") from error
