"""Load a quantized model whose matrices stay 8-bit integers in memory."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from freebits.codecs.rearranging import Joined
from freebits.codecs.registry import CODES
from freebits.errors import UsageError
from freebits.execution.executor import Parallel
from freebits.execution.machine import release_freed_memory
from freebits.integrations.integer_layers import IntegerEmbedding, IntegerLinear, IntegerMatrix
from freebits.packed.reader import PackedFolder
from freebits.storage.staging import new_directory
from freebits.types import bytes_of

_log = logging.getLogger(__name__)
Load = Callable[[Mapping[str, Tensor]], tuple[Any, dict[str, Any]]]


def load_with_integers(packed: PackedFolder, dtype: torch.dtype | None, load: Load) -> tuple[Any, dict[str, Any]]:
    """Load a model, and put integers in the place of its linear layers and embeddings.

    transformers gets a tensor of one repeated value, which takes no memory, for each matrix of integers. A matrix that
    transformers does not use as it is, for example because it merges several into one, is expanded.

    Args:
        packed: the folder.
        dtype: dtype of the model; None for the dtype of each tensor.
        load: function from the model's tensors to the model and transformers' loading information.

    Returns:
        What `load` returned.
    """
    candidates = _integer_tensors(packed)
    others = [name for name in packed.model_specs if name not in candidates]
    rest = {name: tensor for name, tensor in packed.tensors(others) if tensor.numel()}
    while True:
        placeholders = {name: _placeholder(packed, name, dtype) for name in candidates}
        model, information = load(rest | placeholders)
        places = _places(model, placeholders)
        lost = candidates - places.keys()
        if not lost:
            break
        candidates -= lost
        rest |= packed.tensors(lost)
    n_kept = 0
    for name, matrix in _matrices(packed, candidates, {name: placeholders[name].dtype for name in candidates}):
        kept = matrix.fits and all(map(_is_supported, places[name]))
        for module in places[name]:
            if kept:
                _replace(model, module, matrix)
            else:
                module.weight.data = matrix.floats()
        n_kept += kept
    _log.info("freebits: %d of %d matrices of integers are kept", n_kept, len(_integer_tensors(packed)))
    release_freed_memory()
    fingerprints = _fingerprints(model)
    model.save_pretrained = partial(_save, model, packed.path, fingerprints)
    return model, information


def _integer_tensors(packed: PackedFolder) -> set[str]:
    """Return the names of the model's matrices that are made of integers."""
    parts = {name for recipe in packed.manifest.recipes if recipe.code == "integers" for name in recipe.makes}
    joined = {
        name
        for recipe in packed.manifest.recipes
        if isinstance(CODES[recipe.code], Joined) and parts >= {*recipe.takes.values()}
        for name in recipe.makes
    }
    return {name for name in (parts | joined) & packed.model_specs.keys() if len(packed.model_specs[name].shape) == 2}


def _matrices(
    packed: PackedFolder, names: set[str], dtypes: Mapping[str, torch.dtype]
) -> Iterator[tuple[str, IntegerMatrix]]:
    """Yield the name and the integers of each matrix. Several groups are decoded in parallel."""
    recipes = packed.manifest.recipes
    parts = {name: [name] for name in names}
    parts |= {
        name: [recipe.takes[str(number)] for number in range(len(recipe.takes))]
        for recipe in recipes
        if isinstance(CODES[recipe.code], Joined)
        for name in names & recipe.makes.keys()
    }
    sizes = {part: spec.shape[0] for recipe in recipes for part, spec in recipe.makes.items()}
    places = {part: (name, number) for name, all_parts in parts.items() for number, part in enumerate(all_parts)}
    groups = [recipe for recipe in recipes if recipe.code == "integers" and places.keys() & recipe.makes.keys()]
    matrices: dict[str, IntegerMatrix] = {}
    n_missing = {name: len(all_parts) for name, all_parts in parts.items()}
    with Parallel().executor() as executor:
        for recipe, decoded in zip(groups, executor.map(packed.matrices, groups), strict=True):
            for part, block in zip(recipe.makes, decoded, strict=True):
                if part in places:
                    name, number = places[part]
                    if name not in matrices:
                        block_sizes = [sizes[other] for other in parts[name]]
                        matrices[name] = IntegerMatrix(block_sizes, packed.specs[name].shape[1], dtypes[name])
                    matrices[name].fill(number, block)
                    n_missing[name] -= 1
                    if not n_missing[name]:
                        yield name, matrices.pop(name)


def _placeholder(packed: PackedFolder, name: str, dtype: torch.dtype | None) -> Tensor:
    spec = packed.model_specs[name]
    return torch.zeros((), dtype=dtype or spec.dtype).expand(spec.shape)


def _places(model: Any, placeholders: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Return, for each placeholder that is the weight of modules, these modules."""
    names = {tensor.data_ptr(): name for name, tensor in placeholders.items()}
    places: dict[str, list[Any]] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 2 and weight.stride() == (0, 0):
            name = names.get(weight.data_ptr())
            if name is not None:
                places.setdefault(name, []).append(module)
    return places


def _is_supported(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, nn.Embedding)


def _replace(model: Any, module: Any, matrix: IntegerMatrix) -> None:
    names = [name for name, other in model.named_modules() if other is module]
    new = (
        IntegerLinear(matrix, module.bias)
        if isinstance(module, nn.Linear)
        else IntegerEmbedding(matrix, module.padding_idx)
    )
    for name in names:
        model.set_submodule(name, new)


def _fingerprints(model: Any) -> dict[str, str]:
    """Return name → digest of each parameter."""
    return {name: xxhash.xxh3_128_hexdigest(bytes_of(parameter).data) for name, parameter in model.named_parameters()}


def _save(
    model: Any, folder: Path, fingerprints: Mapping[str, str], directory: str | os.PathLike[str], **_options: object
) -> None:
    """Copy the packed folder, from which the model was loaded, to a new directory.

    Raises:
        UsageError: a parameter changed since loading.
        CheckpointError: `directory` already exists.
    """
    for name, fingerprint in _fingerprints(model).items():
        if fingerprints.get(name) != fingerprint:
            raise UsageError(f"parameter {name} changed since loading: load without `keep_integers` to save it")
    with new_directory(directory) as staging:
        shutil.copytree(folder, staging, dirs_exist_ok=True)
