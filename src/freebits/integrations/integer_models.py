"""Load a quantized model whose matrices stay 8-bit or 4-bit integers in memory."""

import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from freebits.codecs.rearranging import Joined
from freebits.codecs.registry import CODES
from freebits.errors import UsageError
from freebits.execution.executor import Parallel
from freebits.execution.machine import release_freed_memory
from freebits.integrations.integer_blocks import GROUP, IntegerBlock
from freebits.integrations.integer_layers import IntegerEmbedding, IntegerLinear, IntegerMatrix
from freebits.packed.reader import PackedFolder
from freebits.packed.recipe import Recipe
from freebits.storage.remote import fill
from freebits.storage.staging import new_directory
from freebits.types import bytes_of

_log = logging.getLogger(__name__)
Load = Callable[[Mapping[str, Tensor]], tuple[Any, dict[str, Any]]]


class _Matrices:
    """The matrices of integers in a packed folder.

    Args:
        packed: the folder.
        dtypes: name of each matrix → its dtype in the model.
    """

    def __init__(self, packed: PackedFolder, dtypes: Mapping[str, torch.dtype]) -> None:
        recipes = packed.manifest.recipes
        self._packed, self._dtypes = packed, dtypes
        self._sizes = {part: spec.shape[0] for recipe in recipes for part, spec in recipe.makes.items()}
        self._parts = {name: [name] for name in dtypes}
        for recipe in recipes:
            if isinstance(CODES[recipe.code], Joined):
                parts = [recipe.takes[str(number)] for number in range(len(recipe.takes))]
                self._parts |= {name: parts for name in recipe.makes if name in dtypes}
        self._recipes = {part: recipe for recipe in recipes if recipe.code == "integers" for part in recipe.makes}

    def empty(self, name: str) -> IntegerMatrix:
        """Return a matrix that is not filled."""
        sizes = [self._sizes[part] for part in self._parts[name]]
        return IntegerMatrix(sizes, self._packed.specs[name].shape[1], self._dtypes[name])

    def filled(self, names: Iterable[str], *, any_size: bool = False) -> Iterator[tuple[str, IntegerMatrix]]:
        """Yield the name and the integers of each matrix. Several recipes are decoded in parallel.

        Args:
            names: names of the matrices.
            any_size: whether to fill also matrices that do not fit (see `IntegerMatrix.fits`). If not, these are
                yielded incomplete.
        """
        places = {part: (name, number) for name in names for number, part in enumerate(self._parts[name])}
        n_missing = Counter(name for name, _ in places.values())
        recipes = [*{id(recipe): recipe for recipe in (self._recipes[part] for part in places)}.values()]
        matrices: dict[str, IntegerMatrix] = {}
        lock = Lock()

        def decode(recipe: Recipe) -> list[str]:
            blocks: dict[int, tuple[str, IntegerBlock]] = {}
            for index, part in enumerate(recipe.makes):
                if part in places:
                    name, index_in_matrix = places[part]
                    with lock:
                        if name not in matrices:
                            matrices[name] = self.empty(name)
                    blocks[index] = name, matrices[name].blocks[index_in_matrix]
            for chunk in self._packed.integer_chunks(recipe, GROUP):
                block = blocks[chunk.index][1] if chunk.index in blocks else None
                if block is not None and (any_size or block.fits):
                    block.add(chunk)
            for _, block in blocks.values():
                if any_size or block.fits:
                    block.finish()
            return [name for name, _ in blocks.values()]

        with Parallel().executor() as executor:
            for filled in executor.map(decode, recipes):
                release_freed_memory()
                for name in filled:
                    n_missing[name] -= 1
                    if not n_missing[name]:
                        yield name, matrices.pop(name)


def load_with_integers(
    packed: PackedFolder, dtype: torch.dtype | None, load: Load, *, late: bool
) -> tuple[Any, dict[str, Any]]:
    """Load a model, and replace its linear layers and embeddings by layers whose weights are integers.

    For each matrix of integers, transformers gets a tensor of one repeated value, which takes no memory. A matrix that
    transformers does not use as it is, for example because transformers merges several matrices, is expanded.

    Args:
        packed: the folder.
        dtype: dtype of the model; None for the dtype of each tensor.
        load: function from the model's tensors to the model and transformers' loading information.
        late: whether the integers of a block are decoded each time a forward pass enters the block, and dropped when it
            leaves the block.

    Returns:
        What `load` returned.
    """
    candidates = _integer_tensors(packed)
    others = [name for name in packed.model_specs if name not in candidates]
    decoded = {name: tensor for name, tensor in packed.tensors(others) if tensor.numel()}
    while True:
        placeholders = {name: _placeholder(packed, name, dtype) for name in candidates}
        model, information = load(decoded | placeholders)
        places = _places(model, placeholders)
        unsupported = {name for name in candidates if not all(map(_is_supported, places.get(name, [None])))}
        if not unsupported:
            break
        candidates -= unsupported
        decoded |= packed.tensors(unsupported)
    matrices = _Matrices(packed, {name: placeholder.dtype for name, placeholder in placeholders.items()})
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    if late:
        _decode_late(model, paths, matrices, places)
    else:
        for name, matrix in matrices.filled(sorted(candidates)):
            if matrix.fits:
                _replace(model, paths, places[name], matrix)
            else:
                candidates.discard(name)
                [(_, weight)] = packed.tensors([name])
                for module in places[name]:
                    module.weight.data = weight.to(matrix.dtype)
    n_all = len(_integer_tensors(packed))
    if len(candidates) < n_all:
        _log.warning(
            "freebits: %d of %d quantized matrices are expanded in memory, because transformers merges or copies them, "
            "or too many of their integers do not fit 8 bits",
            n_all - len(candidates),
            n_all,
        )
    release_freed_memory()
    model.save_pretrained = partial(_save, model, packed.path, _fingerprints(model))
    return model, information


def _decode_late(
    model: Any, paths: Mapping[nn.Module, list[str]], matrices: _Matrices, places: Mapping[str, list[Any]]
) -> None:
    """Register hooks that decode the matrices of a block before its forward pass, and release them afterwards."""
    placed = {name: matrices.empty(name) for name in places}
    for name, matrix in placed.items():
        _replace(model, paths, places[name], matrix)
    name_of = {matrix: name for name, matrix in placed.items()}
    blocks: dict[nn.Module, set[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, IntegerMatrix):
            blocks.setdefault(_block_of(model, path), set()).add(name_of[module])

    n_users, lock = Counter[str](), Lock()  # several threads, or two layers that share a matrix, can use it at once

    def decode(names: Sequence[str], *_: object) -> None:
        with lock:
            unused = [name for name in names if not n_users[name]]
            n_users.update(names)  # before decoding, because `release` is called even if decoding fails
            for name, matrix in matrices.filled(unused, any_size=True):
                placed[name].blocks = matrix.blocks

    def release(names: Sequence[str], *_: object) -> None:
        with lock:
            n_users.subtract(names)
            for name in names:
                if not n_users[name]:
                    placed[name].release()

    for block, names in blocks.items():
        block.register_forward_pre_hook(partial(decode, sorted(names)))
        block.register_forward_hook(partial(release, sorted(names)), always_call=True)


def _block_of(model: Any, path: str) -> nn.Module:
    """Return the module before whose forward pass to decode the matrix at `path`.

    This is the element that contains the matrix in the outermost list of modules. Without a list, it is the layer.
    """
    parts = path.split(".")
    for end in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
            block: nn.Module = model.get_submodule(".".join(parts[: end + 1]))
            return block
    layer: nn.Module = model.get_submodule(".".join(parts[:-1]))
    return layer


def _integer_tensors(packed: PackedFolder) -> set[str]:
    """Return the names of the model's matrices that the code `integers` decodes, whole or in parts."""
    parts = {name for recipe in packed.manifest.recipes if recipe.code == "integers" for name in recipe.makes}
    joined = {
        name
        for recipe in packed.manifest.recipes
        if isinstance(CODES[recipe.code], Joined) and parts >= {*recipe.takes.values()}
        for name in recipe.makes
    }
    specs = packed.model_specs
    return {name for name in (parts | joined) & specs.keys() if len(specs[name].shape) == 2 and specs[name].numel}


def _placeholder(packed: PackedFolder, name: str, dtype: torch.dtype | None) -> Tensor:
    spec = packed.model_specs[name]
    return torch.zeros((), dtype=dtype or spec.dtype).expand(spec.shape)


def _places(model: Any, placeholders: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Return name of a placeholder → the modules whose weight it is. Other placeholders are left out."""
    names = {tensor.data_ptr(): name for name, tensor in placeholders.items()}
    places: dict[str, list[Any]] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 2 and weight.stride() == (0, 0):
            name = names.get(weight.data_ptr())
            if name is not None:
                places.setdefault(name, []).append(module)
    return places


def _is_supported(module: nn.Module | None) -> bool:
    return type(module) is nn.Linear or (type(module) is nn.Embedding and module.max_norm is None)


def _replace(model: Any, paths: Mapping[nn.Module, list[str]], modules: Iterable[Any], matrix: IntegerMatrix) -> None:
    """Replace modules that share a weight by layers of integers that share a matrix. `paths` has the names of each."""
    for module in modules:
        new = (
            IntegerLinear(matrix, module.bias)
            if isinstance(module, nn.Linear)
            else IntegerEmbedding(matrix, module.padding_idx)
        )
        for path in paths[module]:
            model.set_submodule(path, new.train(module.training))


def _fingerprints(model: Any) -> dict[str, str]:
    """Return name → digest of each parameter."""
    return {name: xxhash.xxh3_128_hexdigest(bytes_of(parameter).data) for name, parameter in model.named_parameters()}


def _save(
    model: Any, folder: Path, fingerprints: Mapping[str, str], directory: str | os.PathLike[str], **_options: object
) -> None:
    """Copy the packed folder from which the model was loaded to a new directory.

    Raises:
        UsageError: a parameter changed since loading.
        CheckpointError: `directory` already exists.
    """
    for name, fingerprint in _fingerprints(model).items():
        if fingerprints.get(name) != fingerprint:
            raise UsageError(
                f"parameter {name} changed since loading: to save changes, load without `keep_integers` and "
                "`stay_packed`"
            )
    fill(folder)  # if the folder mirrors a URL, its weights are not on this machine
    with new_directory(directory) as staging:
        shutil.copytree(folder, staging, dirs_exist_ok=True)
