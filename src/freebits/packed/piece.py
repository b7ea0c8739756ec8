"""What packing writes: tensors to be stored, and the recipes that decode them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from freebits.codecs.code import Code, Declined
from freebits.codecs.registry import CODES
from freebits.errors import UsageError
from freebits.execution.stored_values import kept
from freebits.options import ENTROPIES
from freebits.packed.recipe import Recipe
from freebits.types import TensorSpec

kept(TensorSpec)
kept(Recipe)

AUTO = "entropy"
"""The code that `auto` stands for."""


@kept
@dataclass(frozen=True)
class Piece:
    """A part of a model, encoded.

    Attributes:
        stored: name → kind and tensor (flat bytes where PyTorch has no such dtype).
        recipes: in the order in which they are to be followed.
        notes: what became of a site, for people.
    """

    stored: Mapping[str, tuple[TensorSpec, Tensor]] = field(default_factory=dict)
    recipes: tuple[Recipe, ...] = ()
    notes: tuple[dict[str, Any], ...] = ()

    def __add__(self, other: "Piece") -> "Piece":
        return Piece({**self.stored, **other.stored}, self.recipes + other.recipes, self.notes + other.notes)


def plain(tensors: Mapping[str, Tensor]) -> Piece:
    """Tensors stored as they are."""
    return Piece({name: (TensorSpec.of(tensor), tensor) for name, tensor in tensors.items()})


def encoded(
    name: str,
    code: Code,
    label: str,
    tensors: Mapping[str, Tensor],
    makes: Mapping[str, TensorSpec],
    note: dict[str, Any] | None = None,
) -> Piece:
    """Tensors in a code; what is stored is called `label.part`. A note, if there is one, tells of the code.

    Raises:
        Declined: the code does not take them.
    """
    coded = code.encode(list(tensors.values()), list(makes.values()))
    takes = {part: f"{label}.{part}" for part in coded.parts}
    told = {"code": name} | ({"corrections": coded.corrected} if coded.corrected else {})
    return Piece(
        {takes[part]: (TensorSpec.of(tensor), tensor) for part, tensor in coded.parts.items()},
        (Recipe(name, takes, makes, coded.params),),
        () if note is None else (note | told,),
    )


def stage(entropy: str) -> str | None:
    """The code that follows every other, for the name by which users choose it; None for none.

    Raises:
        UsageError: there is no such stage.
    """
    chosen = {"auto": AUTO, "none": None}.get(entropy, entropy)
    if chosen is not None and not (chosen in CODES and CODES[chosen].exact):
        raise UsageError(f"there is no entropy stage {entropy!r}: choose one of {', '.join(ENTROPIES)}")
    return chosen


def staged(piece: Piece, code: str | None, taken: Collection[str] = ()) -> Piece:
    """A piece with each stored tensor that gains by it in a bit-exact code.

    Args:
        piece: what is stored so far.
        code: of `freebits.codecs.registry.CODES`, or None for no such stage.
        taken: names that what is stored may not have.
    """
    if code is None:
        return piece
    stored, recipes = {}, []
    for name, (spec, tensor) in piece.stored.items():
        try:
            coded = CODES[code].encode([tensor], [spec])
        except Declined:
            stored[name] = (spec, tensor)
            continue
        takes = {part: _fresh(f"{name}.{part}", taken) for part in coded.parts}
        stored |= {takes[part]: (TensorSpec.of(part_), part_) for part, part_ in coded.parts.items()}
        recipes.append(Recipe(code, takes, {name: spec}, coded.params))
    return Piece(stored, (*recipes, *piece.recipes), piece.notes)


def _fresh(name: str, taken: Collection[str]) -> str:
    while name in taken:
        name += "_"
    return name
