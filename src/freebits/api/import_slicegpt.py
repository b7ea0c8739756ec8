"""Import models that SliceGPT's own code (TransformerCompression) sliced."""

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
from freebits.api.shared_steps import finish
from freebits.api.slice import write_sliced_config
from freebits.errors import CheckpointError, one_line
from freebits.evaluation.folder_sizes import dense_bytes
from freebits.integrations.loading import one_line_errors
from freebits.models.architecture import Architecture
from freebits.models.families import dense_family
from freebits.models.layout import Layout
from freebits.options import LOSSY
from freebits.packed.unpacking import SLICED_IN
from freebits.storage.auxiliary_files import copy_auxiliary_files, write_remote_code
from freebits.storage.checkpoint import CONFIG, Checkpoint, checkpoint_folder, history_of, history_step, read_json
from freebits.storage.hub import local_folder
from freebits.storage.safetensors_files import WeightsFile
from freebits.storage.staging import new_directory
from freebits.storage.writer import CheckpointWriter
from freebits.types import DTYPE_NAMES, FLOATS

_SHORTCUTS = {"attention": "attn_shortcut_Q", "parallel": "attn_shortcut_Q", "mlp": "mlp_shortcut_Q"}
"""Name of a sublayer → name of its shortcut in TransformerCompression.

The shortcut is the matrix `Q`, (width before, width after), that maps a row `x` of the residual stream to `x Q`.
"""
_EPS = 1e-5
"""Epsilon of every norm in TransformerCompression, which ignores the epsilon of the dense model."""
_SHARD = 5 * 10**9
"""Largest size of a weights file, in bytes."""
_EPS_KEY = re.compile(r"\w*norm\w*_eps(ilon)?")


def import_slicegpt(
    file: str | os.PathLike[str], model: str | os.PathLike[str], out: str | os.PathLike[str]
) -> dict[str, Any]:
    """Convert a model that TransformerCompression sliced to a sliced folder of freebits. The weights stay the same.

    The result computes the same function: its norms also get TransformerCompression's epsilon, 1e-5, instead of the
    epsilon of the dense model. Both projects support Llama, OPT, Phi-2 and Phi-3.

    Args:
        file: a `.pt` file that `run_slicegpt.py` saved, or a `.safetensors` file with the same tensor names. Code in a
            `.pt` file is not run. If there is a `.json` file of the same name next to `file`, its sizes must agree with
            the config of `model`.
        model: folder of the dense model, or id on the hub. The config is required; the tokenizer and other auxiliary
            files are copied. If the folder also contains the weights, the history of the result states their size.
        out: folder to create; if the function fails, no such folder is left.

    Returns:
        The result of `inspect(out)`.

    Raises:
        CheckpointError: the file does not contain a model that was sliced from `model`, or `out` already exists.
        UnsupportedModelError: the residual stream of this model cannot be rotated; the message says why.
    """
    file, folder = Path(file), checkpoint_folder(local_folder(model))
    content = read_json(folder / CONFIG)
    dense_family(content)
    imported = _read_tensors(file)
    dense = Architecture.of(content, len(imported))
    _check_settings(file.with_suffix(".json"), dense)
    architecture = dense.with_tie(False)
    with new_directory(out) as directory:
        tensors = _renamed(imported, architecture, file)
        layout = _layout(tensors, architecture, file)
        config = _config(content, tensors[architecture.embedding.weight], folder)
        _check_shapes(tensors, layout, architecture, dense_shapes(config, folder))
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        with CheckpointWriter(directory, shapes, _SHARD) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor.contiguous())
        copy_auxiliary_files(folder, directory, (file.name for file in folder.glob("model*.safetensors*")))
        write_remote_code(directory, SLICED_IN, architecture.family.sliced_classes)
        has_weights = any(folder.glob("*.safetensors"))
        sizes = dense_bytes(Checkpoint(folder), dense) if has_weights else {}
        step = history_step("slice", LOSSY, sizes, by="TransformerCompression")
        dtype = tensors[architecture.sublayers[0].shortcut.weight].dtype
        write_sliced_config(directory, config, architecture, layout, dtype, [*history_of(content), step])
        return finish(directory, folder)


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """Read all tensors of a file, and return name → tensor.

    Raises:
        CheckpointError: the file is missing or damaged, or contains anything but floating-point matrices and vectors.
    """
    if not file.is_file():
        raise CheckpointError(f"there is no file {file}: give the .pt file that run_slicegpt.py saved")
    if file.suffix == ".safetensors":
        weights = WeightsFile(file)
        content: Any = {name: entry.spec.view(weights.read(name)) for name, entry in weights.entries.items()}
    else:
        content = _unpickled(file)
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"{file} does not contain named tensors: give the .pt file that run_slicegpt.py saved")
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor) or not _is_ordinary(tensor):
            raise CheckpointError(
                f"tensor {one_line(name)} in {file} is not a floating-point matrix or vector: give the .pt file that "
                "run_slicegpt.py saved"
            )
    return content


def _unpickled(file: Path) -> Any:
    """Return the content of a `.pt` file, without running code in the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about tensor types that `_read_tensors` rejects
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror or error}): check the permissions of the file, and the disk"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # PyTorch raises exceptions of many types
        finding = one_line(str(error).partition("\n")[0] or type(error).__name__, 120)
        raise CheckpointError(
            f"{file} is damaged, or contains more than tensors ({finding}): give the .pt file that run_slicegpt.py "
            "saved"
        ) from None


def _is_ordinary(tensor: Tensor) -> bool:
    """Return whether a tensor is a floating-point matrix or vector whose values are all in the file."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.ndim in (1, 2)
    if not plain or tensor.is_quantized or DTYPE_NAMES.get(tensor.dtype) not in FLOATS:
        return False
    return 0 < tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()


def _check_settings(path: Path, architecture: Architecture) -> None:
    """Check that the `.json` file next to the imported file, if there is one, has the sizes of the dense model."""
    if not path.exists():
        return
    settings = read_json(path)
    for key, size in {"hidden_size": architecture.hidden_size, "layers_num": architecture.n_blocks}.items():
        if settings.get(key) not in (None, 0, size):
            raise CheckpointError(
                f"in {path}, {key} is {one_line(settings[key], 40)}, but it is {size} in the dense model: set `model` "
                "to the folder of the model that was sliced"
            )


def _renamed(imported: Mapping[str, Tensor], architecture: Architecture, file: Path) -> dict[str, Tensor]:
    """Return the tensors with freebits' names, in the order of the architecture's table.

    Shortcuts are transposed, because freebits stores them as the weights of linear layers.
    """
    shortcut_names = {}
    for sub in architecture.sublayers:
        block, _, sublayer = sub.name.rpartition(".")
        shortcut_names[sub.shortcut.weight] = f"{block}.{_SHORTCUTS[sublayer]}"
    names = {name: shortcut_names.get(name, name) for name in architecture.weights}
    for name in architecture.without_ignored(sorted(imported.keys() - names.values())):
        raise CheckpointError(
            f"{file} contains {name}, which no sliced {architecture.family.model_type} model has: if it belongs to a "
            "LoRA adapter, merge the adapter into the model first"
        )
    return {
        name: imported[old_name].t() if name in shortcut_names else imported[old_name]
        for name, old_name in names.items()
        if old_name in imported
    }


def _layout(tensors: Mapping[str, Tensor], architecture: Architecture, file: Path) -> Layout:
    """Return the widths of the residual stream before, between and after the shortcuts, from the shortcuts' shapes."""
    names = [sub.shortcut.weight for sub in architecture.sublayers]
    shortcuts = [tensors[name] for name in names if name in tensors and tensors[name].ndim == 2]
    if len(shortcuts) < len(names) or architecture.embedding.weight not in tensors:
        raise CheckpointError(
            f"{file} lacks a shortcut or the embedding, so it is incomplete or belongs to another model: give the .pt "
            "file that run_slicegpt.py saved"
        )
    widths = (shortcuts[0].shape[1], *(shortcut.shape[0] for shortcut in shortcuts))
    return Layout(widths, (None,) * len(shortcuts))


def _config(dense: Mapping[str, Any], embedding: Tensor, folder: Path) -> dict[str, Any]:
    """Return the dense model's config with the vocabulary size and the epsilons of the sliced model.

    The vocabulary of the sliced model can be larger than that of the dense model, because users can add tokens.
    """
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
    """Check that the names and shapes of the tensors are exactly those that the config requires.

    Raises:
        CheckpointError: a tensor is missing or superfluous, or has another shape.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    layout.check(shapes, architecture)
    expected = layout.shapes(architecture, dense)
    for name in sorted(expected.keys() ^ shapes.keys()):
        raise CheckpointError(
            f"tensor {name} is missing, or does not belong to this model: set `model` to the folder of the model that "
            "was sliced"
        )
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise CheckpointError(
                f"tensor {name} has shape {list(shapes[name])}, but {list(shape)} is expected: set `model` to the "
                "folder of the model that was sliced"
            )
