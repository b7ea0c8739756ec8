"""Copy the weights of a packed folder, but change row scales of quantized matrices and values of plain tensors."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from freebits.codecs.integers import Integers
from freebits.packed.contents import STEM, Contents, announced, digested
from freebits.packed.encoded_piece import Piece, plain, stage, staged
from freebits.packed.reader import PackedFolder
from freebits.packed.recipe import Recipe
from freebits.storage.writer import CheckpointWriter
from freebits.types import TensorSpec


def copy_with_changes(
    directory: Path, packed: PackedFolder, rows: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> Contents:
    """Copy the weights of a packed folder, with changes. Unchanged stored tensors are copied byte for byte.

    Args:
        directory: the folder to write to.
        packed: the folder to copy.
        rows: name of a matrix that is stored with the `integers` code → numbers to add to the exponents of its row
            scales, (n,), int16.
        tensors: name → new value of a tensor that is stored plain or only entropy-coded.
    """
    contents = Contents(notes=[*packed.manifest.notes])
    longest = {
        name: TensorSpec("U8", (1 << 39,)) if spec.dtype_name == "U8" else spec for name, spec in packed.stored.items()
    }
    names = announced(longest | {name: packed.specs[name] for name in tensors})
    shard_size = max(file.n_bytes for file in packed.files) if len(packed.files) > 1 else None
    with CheckpointWriter(directory, names, shard_size, STEM) as writer:
        for piece in _pieces(packed, rows, tensors):
            contents.write(writer, *digested(piece))
    order = {name: number for number, recipe in enumerate(packed.manifest.recipes) for name in recipe.makes}
    # recipes that the old manifest lacks come first: they undo entropy coding, which readers must do first
    contents.recipes.sort(key=lambda recipe: order.get(next(iter(recipe.makes)), -1))
    return contents


def _pieces(packed: PackedFolder, rows: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Iterator[Piece]:
    """Yield the stored tensors in order, with the recipes that take them. Then yield all other recipes."""
    code, recipes = stage(packed.manifest.entropy), packed.manifest.recipes
    recipe_of = {name: recipe for recipe in recipes for name in recipe.takes.values()}
    groups: dict[str, tuple[Recipe | None, list[str]]] = {}
    for name in packed.stored:
        recipe = recipe_of.get(name)
        groups.setdefault(next(iter(recipe.makes)) if recipe else name, (recipe, []))[1].append(name)
    for first_name, (recipe, stored_names) in groups.items():
        if first_name in tensors:
            value = tensors[first_name].detach().to("cpu", packed.specs[first_name].dtype)
            yield staged(plain({first_name: value}), code)
        elif recipe and rows.keys() & recipe.makes.keys():
            yield _rescaled(packed, recipe, rows)
        else:
            stored = {name: (packed.stored[name], packed.stored_tensor(name)) for name in stored_names}
            yield Piece(stored, (recipe,) if recipe else ())
    changed_names, other_recipes = {*rows}, []
    for recipe in recipes:
        if changed_names & {*recipe.takes.values(), *recipe.makes}:
            changed_names |= recipe.makes.keys()
        if not packed.stored.keys() & {*recipe.takes.values()}:
            changed = changed_names & recipe.makes.keys()
            other_recipes.append(replace(recipe, digest=None, sums=None) if changed else recipe)
    yield Piece({}, tuple(other_recipes))


def _rescaled(packed: PackedFolder, recipe: Recipe, rows: Mapping[str, Tensor]) -> Piece:
    """Encode the integer matrices that a recipe makes, with new row scales."""
    code, inputs = Integers(recipe.params.get("trellis", 0)), []
    for name, matrix in zip(recipe.makes, packed.integer_chunks(recipe), strict=True):
        exponents = matrix.rows + rows[name] if name in rows else matrix.rows
        inputs += [torch.from_numpy(matrix.integers), exponents, matrix.columns]
    coded = code.encode(inputs, list(recipe.makes.values()))
    stored = {recipe.takes[part]: (TensorSpec.of(tensor), tensor) for part, tensor in coded.parts.items()}
    return Piece(stored, (Recipe(recipe.code, recipe.takes, recipe.makes, coded.params),))
