"""Load the model or the tokenizer in a folder."""

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

from freebits.dequantization.source import open_as_floats
from freebits.errors import CheckpointError, FreebitsError, reason_of
from freebits.integrations.packed_models import (
    adopt_generation_settings,
    auto_class,
    check_complete,
    config_of,
    decode_floats,
    from_tensors,
    warn_about_remote_code,
)
from freebits.models.low_rank import use_pivots
from freebits.packed.reader import PackedFolder, open_folder
from freebits.storage.checkpoint import CONFIG, Folder, is_adapter
from freebits.storage.hub import local_folder
from freebits.storage.remote import fill

_DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
"""The keys under which configs store the number of blocks."""
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")
"""Patterns for the names of the files in which tokenizers are stored."""


def load(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = "auto",
    verify: bool = True,
    base: str | os.PathLike[str] | None = None,
    keep_integers: bool = False,
    stay_packed: bool = False,
    keep_pivots: bool = False,
) -> Any:
    """Load the model in a checkpoint folder. A packed folder is decoded while it is read.

    Args:
        path: folder of the checkpoint, URL of such a folder, or id of a model on the hub.
        dtype: dtype of the weights in memory; `auto` is the dtype of the checkpoint.
        verify: whether to check the digest of every tensor that is read from a packed folder.
        base: folder or hub id of the model's base (see `pack`), if the base has moved since the folder was packed.
        keep_integers: whether the linear layers and embeddings of a quantized model stay integers in memory: of 4 bits
            at about 3 bits per weight or less, otherwise of 8 bits. Forward and backward passes do not expand a whole
            matrix. The logits differ from those of the expanded model by rounding errors only. The weights cannot be
            trained, but adapters on top of them can. Matrices for which this is not possible are expanded, with a
            warning.
        stay_packed: whether the matrices of a quantized model stay in the files. Each forward pass decodes a block when
            it enters the block, and drops it afterwards. Memory then holds the matrices of one block at a time, but a
            forward pass takes longer. This is for scoring texts and for long prompts, not for generating.
        keep_pivots: whether low-rank layers stay in the form in which `pack` stores them, if possible. In this form,
            some columns of one of the two matrices of a layer are an identity matrix. These columns are the *pivots*.
            They are not stored, so the layer has `rank²` fewer weights, and `rank²` fewer multiplications per token.

    Returns:
        A model of transformers.

    Raises:
        CheckpointError: the folder holds no valid checkpoint of a model, or a tensor is damaged or missing. A folder
            that is not packed also raises this error if transformers does not know the model type.
        UnsupportedModelError: transformers has no class for the model.
    """
    path = local_folder(path)
    folder = open_as_floats(path)  # opened before transformers opens it, because freebits' errors have one line
    if is_adapter(folder.config):
        advice = "unpack it, then load it" if isinstance(folder, PackedFolder) else "load it"
        raise CheckpointError(f"{path} holds an adapter: {advice} with PEFT on top of its base model")
    _check_depth(path, folder.config, len(folder.specs))
    warn_about_remote_code(folder.config, path)
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "output_loading_info": True}
    with one_line_errors(path, "model"):
        auto = getattr(transformers, auto_class(folder.config) or "AutoModelForCausalLM")
        if isinstance(folder, PackedFolder):
            options |= {"verify": verify, "base": base, "keep_integers": keep_integers, "stay_packed": stay_packed}
            loaded: Any = auto.from_pretrained(path, trust_remote_code=False, **options)
        elif folder.config.get("model_type") in CONFIG_MAPPING:
            loaded = _from_plain(folder, config_of(folder.config, auto), auto, options)
        else:
            fill(path)
            loaded = auto.from_pretrained(path, trust_remote_code=False, **options)
    model, loading_info = loaded
    check_complete(model, loading_info["missing_keys"], folder.config, path)
    return use_pivots(model) if keep_pivots else model


def _from_plain(folder: Folder, config: Any, auto: Any, options: dict[str, Any]) -> Any:
    """Return the same as `from_pretrained`, but read the tensors with freebits.

    transformers would map the files into memory, and a truncated file would then crash the process.
    """
    wide = options["dtype"] in (torch.float32, torch.float64)
    state = {}
    for name in folder.specs:
        tensor = folder[name]
        state[name] = tensor.to(options["dtype"]) if wide and tensor.is_floating_point() else tensor
    model, loading_info = from_tensors(config, state, auto=auto, **options)
    model.name_or_path = model.config.name_or_path = str(folder.path)
    adopt_generation_settings(model, folder.path)
    return model, loading_info


def _check_depth(path: Path, config: Mapping[str, Any], n_tensors: int) -> None:
    """Check that a config does not have more blocks than there are tensors, before any block is created.

    Raises:
        CheckpointError: the config has more blocks.
    """
    for key in _DEPTH_KEYS:
        if isinstance(config.get(key), int) and config[key] > n_tensors:
            raise CheckpointError(
                f"{key} in {path / CONFIG} is {config[key]}, but there are only {n_tensors} tensors, so the checkpoint "
                "is incomplete: download it again"
            )


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder contains files of a tokenizer."""
    return any(next(folder.glob(pattern), None) for pattern in _TOKENIZER_FILES)


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a checkpoint folder.

    Raises:
        CheckpointError: the folder holds no valid checkpoint, or no tokenizer that transformers can load.
    """
    path = local_folder(path)
    folder = open_folder(path)
    options: dict[str, Any] = {}
    if isinstance(folder, PackedFolder) and folder.config.get("model_type") in CONFIG_MAPPING:
        # for some tokenizers, transformers finds the class only by the model type in the config
        options["config"] = CONFIG_MAPPING[folder.config["model_type"]].from_dict(decode_floats(folder.config))
    with one_line_errors(path, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False, **options
        )
        return tokenizer


@contextmanager
def one_line_errors(path: str | os.PathLike[str], content: str) -> Iterator[None]:
    """Raise a `CheckpointError` if transformers cannot load the `content` of a folder, such as its "model"."""
    try:
        yield
    except FreebitsError:
        raise
    except Exception as error:  # transformers raises many types of errors, which change between versions
        finding = reason_of(error)
        raise CheckpointError(f"{path} holds no {content} that transformers can load ({finding})") from error
