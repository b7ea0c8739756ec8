"""Load a model to run it."""

import os
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import freebits.huggingface.modeling  # noqa: F401  (registers the sliced models)
from freebits.checkpoint import Checkpoint


def load(path: str | os.PathLike[str], *, dtype: torch.dtype | str = "auto", **kwargs: Any) -> Any:
    """The model in a dense, sliced or packed folder, ready to run; a packed one is decoded as it is read.

    Args:
        path: folder of the checkpoint.
        dtype: of the weights in memory; `auto` is the checkpoint's own.
        kwargs: passed on to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        CheckpointError: the folder is no sound checkpoint.
    """
    Checkpoint(path)  # says in one line what transformers would say in many
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True, **kwargs)
