"""Models that SliceGPT's own code sliced: from its file to a folder that loads like any other."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freebits.architecture import Architecture, Layout, dense_family
from freebits.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    carry_over,
    located,
    new_directory,
    shard_bytes,
    write_remote_code,
)
from freebits.errors import CheckpointError, one_line
from freebits.huggingface.config_estimate import dense_shapes
from freebits.huggingface.slice_checkpoint import write_sliced_config
from freebits.moves import LOSSY
from freebits.packed import SLICED_IN, history_of
from freebits.report import dense_bytes, inspect, write_card
from freebits.version import __version__

_SHORTCUTS = {"attention": "attn_shortcut_Q", "parallel": "attn_shortcut_Q", "mlp": "mlp_shortcut_Q"}
"""Sublayer → what the block has for its shortcut there: `Q: (before, after)`, by which rows are multiplied."""
_EPS = 1e-5
"""That of all norms there, whatever the dense model's."""
_EPS_KEY = re.compile(r"\w*norm\w*_eps(ilon)?")


def import_slicegpt(
    file: str | os.PathLike[str], model: str | os.PathLike[str], out: str | os.PathLike[str]
) -> dict[str, Any]:
    """Write a model that TransformerCompression sliced as a folder of ours: the same numbers under our names.

    It computes what it did there: norms have the epsilon that they have there. Families that slice there and here:
    Llama, OPT, Phi-2, Phi-3.

    Args:
        file: a `.pt` of `run_slicegpt.py`, read as tensors alone. A `.json` beside it says which model was sliced.
        model: folder of the dense model, for its config and tokenizer.
        out: folder to create; it appears complete or not at all.

    Returns:
        What `inspect(out)` says.

    Raises:
        CheckpointError: the file holds no such model, or not one sliced from `model`; or `out` exists.
        UnsupportedModelError: no rotation of this model's stream is free; the message says why.
    """
    file, checkpoint = Path(file), Checkpoint(located(model))
    dense_family(checkpoint.config)
    theirs = _tensors(file)
    dense = Architecture.of(checkpoint.config, len(checkpoint.kinds))
    _check_conf(file.with_suffix(".json"), dense)
    architecture = dense.with_tie(False)
    with new_directory(out) as directory:
        tensors = _renamed(theirs, architecture, file)
        layout = _layout(tensors, architecture, file)
        config = _config(checkpoint.config, tensors[architecture.embedding.weight])
        _check_shapes(tensors, layout, architecture, dense_shapes(config, checkpoint.path))
        with CheckpointWriter(
            directory, {name: tuple(of.shape) for name, of in tensors.items()}, shard_bytes(checkpoint)
        ) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor.contiguous())
        carry_over(checkpoint.path, directory)
        write_remote_code(directory, SLICED_IN, architecture.family.sliced_classes)
        move = {
            "move": "slice",
            "fidelity": LOSSY,
            "by": "TransformerCompression",
            "bytes": dense_bytes(checkpoint, dense),
            "producer": f"freebits {__version__}",
        }
        dtype = tensors[architecture.sublayers[0].shortcut.weight].dtype
        write_sliced_config(directory, config, architecture, layout, dtype, [*history_of(checkpoint.config), move])
        write_card(directory, checkpoint.path)
        return inspect(directory)


def _tensors(file: Path) -> dict[str, Tensor]:
    """What is in a file of PyTorch's, where it is nothing but tensors by their names."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # of its many kinds
        finding = one_line(str(error).partition("\n")[0] or type(error).__name__, 120)
        raise CheckpointError(f"{file} is no file of PyTorch's with tensors alone, or is damaged ({finding})") from None
    named = isinstance(found, dict) and all(isinstance(name, str) for name in found)
    if not named or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise CheckpointError(f"{file} holds no tensors by their names: give the .pt that run_slicegpt.py saved")
    return found


def _check_conf(path: Path, architecture: Architecture) -> None:
    """Check that what lies beside the file, if there is one, is of the dense model."""
    if not path.exists():
        return
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        told = {key: told.get(key) for key in ("hidden_size", "layers_num")}
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is not what run_slicegpt.py saved ({error})") from None
    sizes = {"hidden_size": architecture.hidden_size, "layers_num": architecture.n_blocks}
    for key, size in sizes.items():
        if told[key] not in (None, 0, size):
            raise CheckpointError(f"{path}: {key} is {told[key]}, but the dense model's is {size}: give the one sliced")


def _renamed(theirs: Mapping[str, Tensor], architecture: Architecture, file: Path) -> dict[str, Tensor]:
    """The tensors by our names, in our order; a shortcut is the matrix of a linear layer here."""
    names = {}
    for sub in architecture.sublayers:
        block, _, kind = sub.name.rpartition(".")
        names[sub.shortcut.weight] = f"{block}.{_SHORTCUTS[kind]}"
    known = {name: names.get(name, name) for name in architecture.weights}
    for name in architecture.without_ignored(sorted(theirs.keys() - known.values())):
        raise CheckpointError(
            f"{file} holds {name}, which no sliced {architecture.family.model_type} model has: a model with LoRA has "
            "to be merged first"
        )
    return {ours: theirs[name].T if ours in names else theirs[name] for ours, name in known.items() if name in theirs}


def _layout(tensors: Mapping[str, Tensor], architecture: Architecture, file: Path) -> Layout:
    """The widths of the sites, as the shortcuts have them."""
    shortcuts = [tensors.get(sub.shortcut.weight) for sub in architecture.sublayers]
    found = [shortcut for shortcut in shortcuts if shortcut is not None and shortcut.ndim == 2]
    if len(found) < len(shortcuts) or architecture.embedding.weight not in tensors:
        raise CheckpointError(f"{file} lacks a shortcut or the embedding of the model: it is incomplete, or another's")
    widths = (found[0].shape[1], *(shortcut.shape[0] for shortcut in found))
    return Layout(widths, (None,) * len(found))


def _config(dense: Mapping[str, Any], embedding: Tensor) -> dict[str, Any]:
    """The dense model's, where the sliced one is like it: tokens may have been added, and norms are its own."""
    epsilons = {key: _EPS for key in dense if _EPS_KEY.fullmatch(key)}
    return {**dense, **epsilons, "vocab_size": len(embedding), "tie_word_embeddings": False}


def _check_shapes(
    tensors: Mapping[str, Tensor],
    layout: Layout,
    architecture: Architecture,
    dense: Mapping[str, tuple[int, ...]],
) -> None:
    """Check that every tensor is as the config says.

    Raises:
        CheckpointError: it is not.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    layout.check(shapes, architecture)
    for name, shape in layout.shapes(architecture, dense).items():
        if shapes.get(name, shape) != shape:
            raise CheckpointError(f"tensor {name} has shape {list(shapes[name])}, where the model's is {list(shape)}")
