"""Load a model to run it."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from freebits.errors import CheckpointError, FreebitsError, one_line
from freebits.integrations.integer_layers import with_integers
from freebits.integrations.packed_models import (
    adopt_generation_settings,
    auto_class,
    check_complete,
    config_of,
    from_tensors,
    warn_of_code,
    with_floats,
)
from freebits.models.low_rank import with_pivots
from freebits.packed.reader import PackedFolder, opened
from freebits.quantized_inputs.source import readable
from freebits.storage.folder import CONFIG, Checkpoint, is_adapter
from freebits.storage.hub import located
from freebits.storage.remote import fill

_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
"""Under which configs say how many blocks there are."""


def load(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = "auto",
    verify: bool = True,
    keep_integers: bool = False,
    keep_pivots: bool = False,
) -> Any:
    """The model in a dense, sliced or packed folder, ready to run; a packed one is decoded as it is read.

    Args:
        path: folder of the checkpoint.
        dtype: of the weights in memory; `auto` is the checkpoint's own.
        verify: check the digest of every tensor of a packed folder.
        keep_integers: of a quantized folder, leave the blocks' linear layers as integers of a byte each. They take half
            the memory of 16 bits, once loaded; in bfloat16 PyTorch multiplies from there.
        keep_pivots: of a model with layers of low rank in canonical form, do not multiply by their columns of the
            identity: `rank²` multiplications and numbers less for each.

    Raises:
        CheckpointError: the folder is no sound checkpoint, or a tensor is damaged.
    """
    path = located(path)
    folder = readable(path)  # which says in one line what is wrong with it
    packed = isinstance(folder, PackedFolder)
    if is_adapter(folder.config):
        plain = ", once it is unpacked" if packed else ""
        raise CheckpointError(f"{path} holds an adapter: load it with PEFT, on top of its model{plain}")
    _check_depth(path, folder.config, len(folder.specs))
    warn_of_code(folder.config, path)
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "output_loading_info": True}
    with one_line_errors(path, "model"):
        auto = getattr(transformers, auto_class(folder.config) or "AutoModelForCausalLM")
        if isinstance(folder, PackedFolder):
            loaded: Any = auto.from_pretrained(path, trust_remote_code=False, verify=verify, **options)
        elif folder.config.get("model_type") in CONFIG_MAPPING:
            loaded = _from_plain(folder, config_of(folder.config, auto), auto, options)
        else:
            fill(path)
            loaded = auto.from_pretrained(path, trust_remote_code=False, **options)
    model, found = loaded
    check_complete(model, found["missing_keys"], folder.config, path)
    if keep_integers and isinstance(folder, PackedFolder):
        return with_integers(model, folder)
    return with_pivots(model) if keep_pivots else model


def _from_plain(folder: Checkpoint, config: Any, auto: Any, options: dict[str, Any]) -> Any:
    """What `from_pretrained` gives, of tensors that we read: a mapped file that is cut short ends the process."""
    wide = options["dtype"] in (torch.float32, torch.float64)
    state = {}
    for name in folder.specs:
        tensor = folder[name]
        state[name] = tensor.to(options["dtype"]) if wide and tensor.is_floating_point() else tensor
    model, found = from_tensors(config, state, auto=auto, **options)
    model.name_or_path = model.config.name_or_path = str(folder.path)
    adopt_generation_settings(model, folder.path)
    return model, found


def _check_depth(path: Path, config: Mapping[str, Any], n_tensors: int) -> None:
    """Check that a config asks for no more blocks than there are tensors, before any is made.

    Raises:
        CheckpointError: it does.
    """
    for key in _DEPTHS:
        if isinstance(config.get(key), int) and config[key] > n_tensors:
            raise CheckpointError(
                f"{path / CONFIG}: {key} is {config[key]}, but there are {n_tensors} tensors: the checkpoint is "
                "incomplete"
            )


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer in a checkpoint folder.

    Raises:
        CheckpointError: the folder is no sound checkpoint, or has no tokenizer that transformers can load.
    """
    path = located(path)
    folder = opened(path)
    options: dict[str, Any] = {}
    if isinstance(folder, PackedFolder) and folder.config.get("model_type") in CONFIG_MAPPING:
        # some tokenizers are known by their model's type
        options["config"] = CONFIG_MAPPING[folder.config["model_type"]].from_dict(with_floats(folder.config))
    with one_line_errors(path, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False, **options
        )
        return tokenizer


@contextmanager
def one_line_errors(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Turn what transformers says of a folder it cannot load into one line."""
    try:
        yield
    except FreebitsError:
        raise
    except Exception as error:  # its kinds of error are many and change
        finding = one_line(" ".join(str(error).split()) or type(error).__name__, 200)
        raise CheckpointError(f"{path} holds no {what} that transformers can load ({finding})") from error
