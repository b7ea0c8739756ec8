"""Round the differences between a model's matrices and those of its base, instead of the matrices."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from freebits.codecs.added import BASE, DIFFERENCE
from freebits.packed.base import Base, BaseTensor
from freebits.packed.encoded_piece import Piece, plain, staged
from freebits.packed.open_base import OpenBase
from freebits.packed.recipe import Recipe
from freebits.storage.checkpoint import Folder, Source
from freebits.types import FLOATS, TensorSpec, bytes_of

ADDED = "added"


@dataclass(frozen=True)
class BaseTensors(Mapping[str, Tensor]):
    """Some tensors of a folder, by name. A tensor is read when it is needed."""

    folder: Folder
    names: frozenset[str]

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor."""
        if name not in self.names:
            raise KeyError(name)
        return self.folder[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.names)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self.names)


@dataclass(frozen=True)
class Differences:
    """A source whose matrices are differences from the base's matrices of the same names, in float32.

    Attributes:
        source: the model.
        base: its base.
        names: names of the matrices that are differences.
        equal: names of the tensors that are equal to the base's, bit for bit.
    """

    source: Source
    base: OpenBase
    names: frozenset[str]
    equal: frozenset[str]

    @classmethod
    def of(cls, source: Source, base: OpenBase) -> "Differences":
        """Compare a model with its base."""
        names, equal = set(), set()
        for name, spec in base.partners(source.specs).items():
            if spec == source.specs[name]:
                if np.array_equal(bytes_of(source[name]), bytes_of(base.folder[name])):
                    equal.add(name)
                elif spec.dtype_name in FLOATS[:3] and len(spec.shape) > 1:
                    names.add(name)
        return cls(source, base, frozenset(names), frozenset(equal))

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of `config.json`."""
        return self.source.config

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """The specs of the tensors. Differences have the dtype F32."""
        return {
            name: TensorSpec("F32", spec.shape) if name in self.names else spec
            for name, spec in self.source.specs.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor, or its difference from that of the base."""
        tensor = self.source[name]
        return tensor.float() - self.base.folder[name].float() if name in self.names else tensor

    @property
    def base_tensors(self) -> "BaseTensors":
        """The tensors of the base to which differences are added."""
        return BaseTensors(self.base.folder, self.names)

    def added(self, recipes: Sequence[Recipe]) -> tuple[Recipe, ...]:
        """Return `recipes`, which make differences, and recipes that add the base's tensors to the differences."""
        result: list[Recipe] = []
        for recipe in recipes:
            names = [name for name in recipe.makes if name in self.names]
            makes = {f"{name}.{DIFFERENCE}" if name in names else name: spec for name, spec in recipe.makes.items()}
            result.append(replace(recipe, makes=makes))
            for name in names:
                takes = {BASE: f"{name}.{BASE}", DIFFERENCE: f"{name}.{DIFFERENCE}"}
                result.append(Recipe(ADDED, takes, {name: self.source.specs[name]}))
        return tuple(result)

    def on_base(self, piece: Piece) -> tuple[Piece, dict[str, Tensor]]:
        """Add the base's tensors to the differences that a piece makes.

        Returns:
            The piece with the further recipes, and the tensors of the base, by the names by which recipes take them.
        """
        difference_names = [name for recipe in piece.recipes for name in recipe.makes if name in self.names]
        read = {f"{name}.{BASE}": self.base[name] for name in difference_names}
        tensors = {name: tensor for name, (tensor, _) in read.items()}
        changed = replace(piece, recipes=self.added(piece.recipes), base={**piece.base, **tensors})
        return changed, {name: values for name, (_, values) in read.items()}

    def expected_base(self, tensors: Mapping[str, BaseTensor]) -> Base:
        """Return the base with `tensors`, and with the tensors of all differences. The latter get zeros as digests."""
        added = {f"{name}.{BASE}": BaseTensor(name, self.source.specs[name], "0" * 32) for name in self.names}
        return replace(self.base.base, tensors={**tensors, **added})

    def exact(self, name: str, tensor: Tensor, stage: str | None) -> tuple[Piece, dict[str, Tensor]]:
        """Encode bit for bit a tensor that is not rounded, as differences from the base if this saves bytes.

        Returns:
            See `on_base`.
        """
        spec = self.source.specs[name]
        return self.base.exact_piece(name, spec, tensor, lambda: staged(plain({name: tensor}), stage))
