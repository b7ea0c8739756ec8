"""Models that SliceGPT's own code sliced: from its file to a folder that loads like any other."""

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from freebits.api.estimate import dense_shapes
from freebits.api.slice import write_sliced_config
from freebits.errors import CheckpointError, one_line
from freebits.evaluation.card import write_card
from freebits.evaluation.inspection import inspect
from freebits.evaluation.sizes import dense_bytes
from freebits.integrations.loading import one_line_errors
from freebits.models.families import dense_family
from freebits.models.layout import Layout
from freebits.models.table import Architecture
from freebits.options import LOSSY
from freebits.packed.packing import history_of
from freebits.packed.unpacking import SLICED_IN
from freebits.storage.auxiliary_files import carry_over, write_remote_code
from freebits.storage.folder import CONFIG, Checkpoint, existing_folder, read_json
from freebits.storage.hub import located
from freebits.storage.staging import new_directory
from freebits.storage.weights import WeightsFile
from freebits.storage.writer import CheckpointWriter
from freebits.types import DTYPE_CODES, FLOATS
from freebits.version import __version__

_SHORTCUTS = {"attention": "attn_shortcut_Q", "parallel": "attn_shortcut_Q", "mlp": "mlp_shortcut_Q"}
"""Sublayer → what the block has for its shortcut there: `Q: (before, after)`, by which rows are multiplied."""
_EPS = 1e-5
"""That of all norms there, whatever the dense model's."""
_SHARD = 5 * 10**9
"""Bytes of a file, at most."""
_EPS_KEY = re.compile(r"\w*norm\w*_eps(ilon)?")


def import_slicegpt(
    file: str | os.PathLike[str], model: str | os.PathLike[str], out: str | os.PathLike[str]
) -> dict[str, Any]:
    """Write a model that TransformerCompression sliced as a folder of ours: the same numbers under our names.

    It computes what it did there: norms have the epsilon that they have there. Families that slice there and here:
    Llama, OPT, Phi-2, Phi-3.

    Args:
        file: a `.pt` of `run_slicegpt.py`, read as tensors alone, or a `.safetensors` of the same names. A `.json`
            beside it says which model was sliced.
        model: folder of the dense model, for its config and tokenizer, and its size if its weights are there.
        out: folder to create; it appears complete or not at all.

    Returns:
        What `inspect(out)` says.

    Raises:
        CheckpointError: the file holds no such model, or not one sliced from `model`; or `out` exists.
        UnsupportedModelError: no rotation of this model's stream is free; the message says why.
    """
    file, folder = Path(file), existing_folder(located(model))
    content = read_json(folder / CONFIG)
    dense_family(content)
    theirs = _tensors(file)
    dense = Architecture.of(content, len(theirs))
    _check_conf(file.with_suffix(".json"), dense)
    architecture = dense.with_tie(False)
    with new_directory(out) as directory:
        tensors = _renamed(theirs, architecture, file)
        layout = _layout(tensors, architecture, file)
        config = _config(content, tensors[architecture.embedding.weight], folder)
        _check_shapes(tensors, layout, architecture, dense_shapes(config, folder))
        shapes = {name: tuple(of.shape) for name, of in tensors.items()}
        with CheckpointWriter(directory, shapes, _SHARD) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor.contiguous())
        carry_over(folder, directory, (file.name for file in folder.glob("model*.safetensors*")))
        write_remote_code(directory, SLICED_IN, architecture.family.sliced_classes)
        sized = any(folder.glob("*.safetensors"))
        transform = {
            "transform": "slice",
            "fidelity": LOSSY,
            "by": "TransformerCompression",
            **({"bytes": dense_bytes(Checkpoint(folder), dense)} if sized else {}),
            "producer": f"freebits {__version__}",
        }
        dtype = tensors[architecture.sublayers[0].shortcut.weight].dtype
        write_sliced_config(directory, config, architecture, layout, dtype, [*history_of(content), transform])
        write_card(directory, folder)
        return inspect(directory)


def _tensors(file: Path) -> dict[str, Tensor]:
    """What is in a file, where it is nothing but matrices and vectors of floats by their names."""
    if not file.is_file():
        raise CheckpointError(f"{file} is no file: give the .pt that run_slicegpt.py saved")
    if file.suffix == ".safetensors":
        weights = WeightsFile(file)
        found: Any = {name: entry.spec.view(weights.read(name)) for name, entry in weights.entries.items()}
    else:
        found = _unpickled(file)
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise CheckpointError(f"{file} holds no tensors by their names: give the .pt that run_slicegpt.py saved")
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor) or not _is_ordinary(tensor):
            raise CheckpointError(f"{file}: {one_line(name)} is no matrix or vector of floats")
    return found


def _unpickled(file: Path) -> Any:
    """What PyTorch reads without running anything."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kinds of tensors that are refused
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from None
    except MemoryError:
        raise
    except Exception as error:  # of its many kinds
        finding = one_line(str(error).partition("\n")[0] or type(error).__name__, 120)
        raise CheckpointError(f"{file} is no file of PyTorch's with tensors alone, or is damaged ({finding})") from None


def _is_ordinary(tensor: Tensor) -> bool:
    """Whether a tensor is one of those a model is made of, and has in its file what it says that it has."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.ndim in (1, 2)
    if not plain or tensor.is_quantized or DTYPE_CODES.get(tensor.dtype) not in FLOATS:
        return False
    return 0 < tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()


def _check_conf(path: Path, architecture: Architecture) -> None:
    """Check that what lies beside the file, if there is something, is of the dense model."""
    if not path.exists():
        return
    told = read_json(path)
    for key, size in {"hidden_size": architecture.hidden_size, "layers_num": architecture.n_blocks}.items():
        if told.get(key) not in (None, 0, size):
            raise CheckpointError(
                f"{path}: {key} is {one_line(told[key], 40)}, but the dense model's is {size}: give the one sliced"
            )


def _renamed(theirs: Mapping[str, Tensor], architecture: Architecture, file: Path) -> dict[str, Tensor]:
    """The tensors by our names, in our order; a shortcut is the matrix of a linear layer here."""
    names = {}
    for sub in architecture.sublayers:
        block, _, spec = sub.name.rpartition(".")
        names[sub.shortcut.weight] = f"{block}.{_SHORTCUTS[spec]}"
    known = {name: names.get(name, name) for name in architecture.weights}
    for name in architecture.without_ignored(sorted(theirs.keys() - known.values())):
        raise CheckpointError(
            f"{file} holds {name}, which no sliced {architecture.family.model_type} model has: a model with LoRA has "
            "to be merged first"
        )
    return {ours: theirs[name].t() if ours in names else theirs[name] for ours, name in known.items() if name in theirs}


def _layout(tensors: Mapping[str, Tensor], architecture: Architecture, file: Path) -> Layout:
    """The widths of the sites, as the shortcuts have them."""
    shortcuts = [tensors.get(sub.shortcut.weight) for sub in architecture.sublayers]
    found = [shortcut for shortcut in shortcuts if shortcut is not None and shortcut.ndim == 2]
    if len(found) < len(shortcuts) or architecture.embedding.weight not in tensors:
        raise CheckpointError(f"{file} lacks a shortcut or the embedding of the model: it is incomplete, or another's")
    widths = (found[0].shape[1], *(shortcut.shape[0] for shortcut in found))
    return Layout(widths, (None,) * len(found))


def _config(dense: Mapping[str, Any], embedding: Tensor, folder: Path) -> dict[str, Any]:
    """The dense model's, where the sliced one is like it: tokens may have been added, and norms are its own."""
    with one_line_errors(folder, "config"):
        keys = AutoConfig.for_model(**dense).to_dict().keys()
    epsilons = {key: _EPS for key in keys if _EPS_KEY.fullmatch(key)}
    return {**dense, **epsilons, "vocab_size": len(embedding), "tie_word_embeddings": False}


def _check_shapes(
    tensors: Mapping[str, Tensor],
    layout: Layout,
    architecture: Architecture,
    dense: Mapping[str, tuple[int, ...]],
) -> None:
    """Check that there is every tensor that the config asks for, of its shape, and no other.

    Raises:
        CheckpointError: it is not so.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    layout.check(shapes, architecture)
    wanted = layout.shapes(architecture, dense)
    for name in sorted(wanted.keys() ^ shapes.keys()):
        raise CheckpointError(f"tensor {name} is missing, or not part of the model that was sliced")
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise CheckpointError(f"tensor {name} has shape {list(shapes[name])}, where the model's is {list(shape)}")
