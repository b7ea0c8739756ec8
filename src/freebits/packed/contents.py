"""What packing has written so far, as the manifest will tell it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from freebits.packed.manifest import digest
from freebits.packed.piece import Piece
from freebits.packed.recipe import Recipe
from freebits.storage.writer import CheckpointWriter
from freebits.types import TensorSpec, bytes_of

STEM = "packed"
"""With which the weights files' names begin: not `model`, so that nothing takes them for a model's as they are."""
LONGEST_STAGE = ".entropy__"


@dataclass
class Contents:
    """Recipes, notes, stored tensors and their digests; see `Manifest`. It grows piece by piece."""

    recipes: list[Recipe] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)
    stored: dict[str, TensorSpec] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    originals: dict[str, str] = field(default_factory=dict)
    auxiliary: list[str] = field(default_factory=list)

    def write(self, writer: CheckpointWriter, piece: Piece, digests: Mapping[str, str]) -> None:
        """Write a piece, and note it."""
        for name, (spec, tensor) in piece.stored.items():
            writer.write_bytes(name, spec, bytes_of(tensor))
        self.recipes += piece.recipes
        self.notes += piece.notes
        self.stored |= {name: spec for name, (spec, _) in piece.stored.items()}
        self.digests |= digests


def digests_of(piece: Piece) -> dict[str, str]:
    """The digest of each stored tensor."""
    return {name: digest(spec, bytes_of(tensor)) for name, (spec, tensor) in piece.stored.items()}


def announced(specs: Mapping[str, TensorSpec]) -> dict[str, tuple[int, ...]]:
    """What a writer is told may come: tensors by the names that they have at most, entropy-coded rows of bytes."""
    return {name + LONGEST_STAGE: (*spec.shape, 10) for name, spec in specs.items()}
