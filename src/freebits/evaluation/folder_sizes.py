"""Count the bytes of checkpoint folders. All reported sizes of folders come from this module."""

from collections.abc import Iterator

from freebits.errors import CheckpointError, UnsupportedModelError
from freebits.models.architecture import EMBEDDINGS, HEAD, Architecture
from freebits.packed.manifest import MANIFEST
from freebits.packed.reader import PackedFolder
from freebits.storage.checkpoint import Folder, config_name

SIDE_DATA, OTHER, OVERHEAD = "side data", "other tensors", "headers, manifest, config"
_SIDE_PARTS = ("signs", "corrections")


def bytes_on_disk(folder: Folder) -> int:
    """Return the bytes of the files that define a model: weights, index, manifest and config.

    The tokenizer, the model card and other auxiliary files are not counted.
    """
    metadata = (folder.path / name for name in (config_name(folder.path), MANIFEST))
    return sum(file.stat().st_size for file in (*folder.weight_files, *metadata) if file.is_file())


def dense_bytes(dense: Folder, architecture: Architecture) -> dict[str, int]:
    """Return two baselines: `dense`, the bytes on disk, and `dense_untied`, the same with an untied head."""
    on_disk = bytes_on_disk(dense)
    head, embedding = architecture.head.weight, architecture.embedding.weight
    shared = architecture.tied and head not in dense.specs and embedding in dense.specs
    return {"dense": on_disk, "dense_untied": on_disk + (dense.specs[embedding].n_bytes if shared else 0)}


def groups(folder: Folder) -> dict[str, int]:
    """Return the bytes on disk by purpose: groups such as attention, side data, other tensors, and overhead."""
    group_of = _group_by_tensor(folder)
    sizes = dict.fromkeys((EMBEDDINGS, *dict.fromkeys(group_of.values()), HEAD, SIDE_DATA, OTHER), 0)
    for size, tensor, part in _uses(folder):
        sizes[SIDE_DATA if part in _SIDE_PARTS else group_of.get(tensor, OTHER)] += size
    sizes[OVERHEAD] = bytes_on_disk(folder) - sum(sizes.values())
    return {group: size for group, size in sizes.items() if size}


def bits_by_tensor(folder: Folder) -> dict[str, float]:
    """Return name of a tensor → stored bits per weight, including side data."""
    sizes = dict.fromkeys(folder.specs, 0)
    for size, tensor, _ in _uses(folder):
        sizes[tensor] += size
    return {name: 8 * size / folder.specs[name].numel for name, size in sizes.items() if folder.specs[name].numel}


def side_bytes(folder: PackedFolder, part: str) -> int:
    """Return the bytes of all stored tensors with a given part of an encoding, such as `corrections`."""
    return sum(size for size, _, used_as in _uses(folder) if used_as == part)


def change(n_bytes: int | None, baseline: int | None) -> float | None:
    """Return the difference from `baseline` in percent, negative if smaller. Return None if a size is unknown."""
    return 100 * (n_bytes / baseline - 1) if n_bytes and baseline else None


def _group_by_tensor(folder: Folder) -> dict[str, str]:
    """Return name of a tensor → group of the architecture; empty for an unknown architecture."""
    try:
        architecture = Architecture.of(folder.config, len(folder.specs))
    except (UnsupportedModelError, CheckpointError):
        return {}
    return {name: weight.group for name, weight in architecture.weights.items()}


def _uses(folder: Folder) -> Iterator[tuple[int, str, str]]:
    """Yield `(n_bytes, tensor, part)`: a part of the encoding of `tensor` takes `n_bytes` stored bytes.

    If a stored tensor encodes several tensors, its bytes are divided in proportion to the numbers of their values.
    """
    stored, recipes = folder.specs, []
    if isinstance(folder, PackedFolder):
        stored, recipes = folder.stored, folder.manifest.recipes
    readers = {name: (recipe, part) for recipe in recipes for part, name in recipe.takes.items()}
    pending = [(spec.n_bytes, name, "") for name, spec in stored.items()]
    while pending:
        size, name, part = pending.pop()
        if name not in readers:
            yield size, name, part
            continue
        recipe, part = readers[name]
        total, assigned = sum(spec.numel for spec in recipe.makes.values()), 0
        for number, (output, spec) in enumerate(recipe.makes.items(), start=1):
            share = size - assigned if number == len(recipe.makes) else size * spec.numel // (total or 1)
            assigned += share
            pending.append((share, output, part))
