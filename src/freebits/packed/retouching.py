"""A packed folder again, with other steps for its integers and other tensors that are stored as they are."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from freebits.codecs.integers import Integers
from freebits.packed.contents import STEM, Contents, announced, digests_of
from freebits.packed.piece import Piece, plain, stage, staged
from freebits.packed.reader import PackedFolder
from freebits.packed.recipe import Recipe
from freebits.storage.writer import CheckpointWriter
from freebits.types import TensorSpec


def retouch(
    directory: Path, packed: PackedFolder, rows: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> Contents:
    """Write a folder's weights; what does not change is copied, byte for byte.

    Args:
        directory: where to write.
        packed: the folder.
        rows: matrix that is made of integers → by how much the exponents of its rows grow, int16.
        tensors: what stands in the place of tensors that are stored as they are, but for an entropy stage.
    """
    contents = Contents(notes=[*packed.manifest.notes])
    longest = {name: TensorSpec("U8", (1 << 39,)) if of.code == "U8" else of for name, of in packed.stored.items()}
    names = announced(longest | {name: packed.specs[name] for name in tensors})
    size = max(file.n_bytes for file in packed.files) if len(packed.files) > 1 else None
    with CheckpointWriter(directory, names, size, STEM) as writer:
        for piece in _pieces(packed, rows, tensors):
            contents.write(writer, piece, digests_of(piece))
    order = {name: number for number, recipe in enumerate(packed.manifest.recipes) for name in recipe.makes}
    contents.recipes.sort(key=lambda recipe: order.get(next(iter(recipe.makes)), -1))  # a stage that is new comes first
    return contents


def _pieces(packed: PackedFolder, rows: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Iterator[Piece]:
    """What is stored, in its order, each with the recipe that takes it; then the recipes that take what is made."""
    code, recipes = stage(packed.manifest.entropy), packed.manifest.recipes
    taken = {name: recipe for recipe in recipes for name in recipe.takes.values()}
    groups: dict[str, tuple[Recipe | None, list[str]]] = {}
    for name in packed.stored:
        recipe = taken.get(name)
        groups.setdefault(next(iter(recipe.makes)) if recipe else name, (recipe, []))[1].append(name)
    for made, (recipe, parts) in groups.items():
        if made in tensors:
            yield staged(plain({made: tensors[made].detach().to("cpu", packed.specs[made].dtype)}), code)
        elif recipe and rows.keys() & recipe.makes.keys():
            yield _rescaled(packed, recipe, rows)
        else:
            stored = {part: (packed.stored[part], packed.stored_tensor(part)) for part in parts}
            yield Piece(stored, (recipe,) if recipe else ())
    yield Piece({}, tuple(recipe for recipe in recipes if not packed.stored.keys() & {*recipe.takes.values()}))


def _rescaled(packed: PackedFolder, recipe: Recipe, rows: Mapping[str, Tensor]) -> Piece:
    """The integers of some matrices, with other steps."""
    code, encoded = Integers(), []
    for name, matrix in zip(recipe.makes, packed.matrices(recipe, code), strict=True):
        grown = matrix.rows + rows[name] if name in rows else matrix.rows
        encoded += [matrix.integers, grown, matrix.columns]
    coded = code.encode(encoded, list(recipe.makes.values()))
    stored = {recipe.takes[part]: (TensorSpec.of(tensor), tensor) for part, tensor in coded.parts.items()}
    return Piece(stored, (Recipe(recipe.code, recipe.takes, recipe.makes, coded.params),))
