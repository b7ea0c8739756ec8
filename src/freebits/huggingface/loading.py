"""Load a model to run it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from freebits.checkpoint import Checkpoint
from freebits.errors import CheckpointError, FreebitsError, UsageError
from freebits.huggingface.modeling import settle  # the import registers the sliced models
from freebits.packed import is_exact, is_packed, open_packed


def load(path: str | os.PathLike[str], *, dtype: torch.dtype | str = "auto") -> Any:
    """The model in a dense, sliced or packed folder, ready to run; a packed one is decoded as it is read.

    Args:
        path: folder of the checkpoint.
        dtype: of the weights in memory; `auto` is the checkpoint's own.

    Raises:
        CheckpointError: the folder is no sound checkpoint.
    """
    Checkpoint(path)
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    with understood(path, "model"):
        if is_packed(path) and is_exact(path):
            model, found = _load_exact(path, options)
        else:
            model, found = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
                path, local_files_only=True, trust_remote_code=False, **options
            )
    if found["missing_keys"]:  # transformers fills them in at random
        raise CheckpointError(f"tensor {min(found['missing_keys'])} is missing in {path}: the checkpoint is incomplete")
    return model


def _load_exact(path: str | os.PathLike[str], options: dict[str, Any]) -> Any:
    """A model packed with codec `none`: its `config.json` is that of a model as any other, its weights are not."""
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    state = dict(open_packed(path).tensors())
    model, found = kind.from_pretrained(None, config=config, state_dict=state, **options)
    settle(model, path, Path(path))
    return model, found


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer in a checkpoint folder.

    Raises:
        CheckpointError: the folder is no sound checkpoint, or has no tokenizer that transformers can load.
    """
    Checkpoint(path)
    with understood(path, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
        return tokenizer


def device_of(name: str) -> torch.device:
    """The device of that name.

    Raises:
        UsageError: there is none on this machine.
    """
    try:
        return torch.ones(1, device=name).cpu().new_empty(0, device=name).device
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        finding = str(error).strip().partition("\n")[0]
        raise UsageError(f"device {name!r} cannot be used here ({finding})") from None


@contextmanager
def understood(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Turn what transformers says of a folder it cannot load into one line."""
    try:
        yield
    except FreebitsError:
        raise
    except Exception as error:  # its kinds of error are many and change
        finding = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{path} holds no {what} that transformers can load ({finding})") from error
