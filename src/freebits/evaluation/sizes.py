"""Count bytes. Everything that states a size asks here."""

from collections.abc import Iterator

from freebits.errors import CheckpointError, UnsupportedModelError
from freebits.models.table import EMBEDDINGS, HEAD, Architecture
from freebits.packed.manifest import MANIFEST
from freebits.packed.reader import PackedFolder
from freebits.storage.folder import Checkpoint, config_name

SIDE_DATA, OTHER, AROUND = "side data", "other tensors", "headers, manifest, config"
_SIDE_PARTS = ("signs", "corrections")


def bytes_on_disk(folder: Checkpoint | PackedFolder) -> int:
    """What a model's folder needs to be loaded: weights, index, manifest, `config.json`.

    The tokenizer and the model card are left out, as they are the same in every form of the model.
    """
    around = (folder.path / name for name in (config_name(folder.path), MANIFEST))
    return sum(file.stat().st_size for file in (*folder.weight_files, *around) if file.is_file())


def dense_bytes(dense: Checkpoint, architecture: Architecture) -> dict[str, int]:
    """The two baselines: `dense`, the files as they are, and `dense_untied`, the paper's, with a head of its own."""
    on_disk = bytes_on_disk(dense)
    head, embedding = architecture.head.weight, architecture.embedding.weight
    shared = architecture.tied and head not in dense.specs and embedding in dense.specs
    return {"dense": on_disk, "dense_untied": on_disk + (dense.specs[embedding].n_bytes if shared else 0)}


def groups(folder: Checkpoint | PackedFolder) -> dict[str, int]:
    """Bytes on disk by what they are for: a group of the table, side data, or everything around the tensors."""
    table = _table(folder)
    sizes = dict.fromkeys((EMBEDDINGS, *dict.fromkeys(table.values()), HEAD, SIDE_DATA, OTHER), 0)
    for size, tensor, part in _uses(folder):
        sizes[SIDE_DATA if part in _SIDE_PARTS else table.get(tensor, OTHER)] += size
    sizes[AROUND] = bytes_on_disk(folder) - sum(sizes.values())
    return {group: size for group, size in sizes.items() if size}


def bits_by_tensor(folder: Checkpoint | PackedFolder) -> dict[str, float]:
    """Name of a tensor → stored bits for each of its numbers, side data counted in."""
    sizes = dict.fromkeys(folder.specs, 0)
    for size, tensor, _ in _uses(folder):
        sizes[tensor] += size
    return {name: 8 * size / folder.specs[name].numel for name, size in sizes.items() if folder.specs[name].numel}


def side_bytes(folder: PackedFolder, part: str) -> int:
    """Bytes of the stored tensors that are that part of a code, entropy-coded or not."""
    return sum(size for size, _, of in _uses(folder) if of == part)


def change(n_bytes: int | None, baseline: int | None) -> float | None:
    """Percent by which `n_bytes` differs from `baseline`; negative is smaller."""
    return 100 * (n_bytes / baseline - 1) if n_bytes and baseline else None


def _table(folder: Checkpoint | PackedFolder) -> dict[str, str]:
    """Tensor → group of the table; empty for an architecture that is not known."""
    try:
        architecture = Architecture.of(folder.config, len(folder.specs))
    except (UnsupportedModelError, CheckpointError):
        return {}
    return {name: weight.group for name, weight in architecture.weights.items()}


def _uses(folder: Checkpoint | PackedFolder) -> Iterator[tuple[int, str, str]]:
    """For each stored tensor bytes, a tensor of the model in which they end up, and which part of its code they are."""
    stored, recipes = folder.specs, []
    if isinstance(folder, PackedFolder):
        stored, recipes = folder.stored, folder.manifest.recipes
    takers = {name: (recipe, part) for recipe in recipes for part, name in recipe.takes.items()}
    left = [(spec.n_bytes, name, "") for name, spec in stored.items()]
    while left:
        size, name, part = left.pop()
        if name not in takers:
            yield size, name, part
            continue
        recipe, part = takers[name]
        total, shared = sum(spec.numel for spec in recipe.makes.values()), 0
        for number, (made, spec) in enumerate(recipe.makes.items(), start=1):  # each by how many numbers it has
            share = size - shared if number == len(recipe.makes) else size * spec.numel // (total or 1)
            shared += share
            left.append((share, made, part))
