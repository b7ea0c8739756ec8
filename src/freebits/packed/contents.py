"""Collect the data that the manifest records about the written tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from freebits.codecs.base import Check
from freebits.codecs.registry import CODES
from freebits.packed.base import BaseTensor
from freebits.packed.encoded_piece import Piece
from freebits.packed.manifest import digest
from freebits.packed.recipe import Recipe
from freebits.storage.writer import CheckpointWriter
from freebits.types import TensorSpec, bytes_of

STEM = "packed"
"""The stem of the names of weights files. It is not `model`, so that no tool loads the files as a model."""
_LONGEST_SUFFIX = ".entropy__"
"""Suffix of an entropy-coded tensor whose name with `.entropy` and with `.entropy_` is used already."""


@dataclass
class Contents:
    """Recipes and notes, and the specs and digests of stored tensors, collected piece by piece; see `Manifest`."""

    recipes: list[Recipe] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)
    stored: dict[str, TensorSpec] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    originals: dict[str, str] = field(default_factory=dict)
    auxiliary: list[str] = field(default_factory=list)
    base: dict[str, BaseTensor] = field(default_factory=dict)

    def write(self, writer: CheckpointWriter, piece: Piece, digests: Mapping[str, str]) -> None:
        """Write the tensors of a piece. Collect its recipes and notes, and the given digests of its tensors."""
        for name, (spec, tensor) in piece.stored.items():
            writer.write_bytes(name, spec, bytes_of(tensor))
        self.recipes += piece.recipes
        self.notes += piece.notes
        self.stored |= {name: spec for name, (spec, _) in piece.stored.items()}
        self.digests |= digests
        self.base |= piece.base


def digested(piece: Piece, base: Mapping[str, Tensor] | None = None) -> tuple[Piece, dict[str, str]]:
    """Add checks to a piece. Return the piece, and name → digest of each stored tensor.

    A recipe gets a digest or sums of the tensors that it makes, computed by decoding them. A recipe stays as it is if
    its code checks the values itself, or if it takes a tensor that is not in this piece, not in `base` and not decoded
    here. `base` has the tensors of the base, by the names by which recipes take them.
    """
    tensors = {name: spec.view(bytes_of(tensor)) for name, (spec, tensor) in piece.stored.items()} | dict(base or {})
    recipes = []
    for recipe in piece.recipes:
        code = CODES[recipe.code]
        if code.check is not Check.NONE and tensors.keys() >= {*recipe.takes.values()}:
            parts = {part: tensors.pop(name) for part, name in recipe.takes.items()}
            decoded = code.decode(parts, list(recipe.makes.values()), recipe.params)
            tensors |= zip(recipe.makes, decoded, strict=True)
            recipe.check(decoded)  # if `staged` recorded a digest of the original, the decoded tensor must match it
            recipes.append(recipe.checked(decoded))
        else:
            recipes.append(recipe)
    digests = {name: digest(spec, bytes_of(tensor)) for name, (spec, tensor) in piece.stored.items()}
    return replace(piece, recipes=tuple(recipes)), digests


def announced(specs: Mapping[str, TensorSpec]) -> dict[str, tuple[int, ...]]:
    """Return name → shape, each with the most characters that a stored tensor can need; see `CheckpointWriter`.

    Entropy coding appends `.entropy` to the name, and `_` until the name is unused. The coded tensor is a vector of
    fewer than 10 bytes per value. The announced shape ends with a 10, so that it has at least as many characters.
    """
    return {name + _LONGEST_SUFFIX: (*spec.shape, 10) for name, spec in specs.items()}
