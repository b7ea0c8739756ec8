"""Encode the pieces of a model: tensors to store, and the recipes that decode them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from freebits.codecs.base import Code, Declined
from freebits.codecs.registry import CODES
from freebits.errors import UsageError
from freebits.execution.serialization import storable
from freebits.options import ENTROPIES
from freebits.packed.recipe import Recipe
from freebits.types import TensorSpec

storable(TensorSpec)
storable(Recipe)

AUTO = "entropy"
"""The code that the entropy stage `auto` uses."""


@storable
@dataclass(frozen=True)
class Piece:
    """An encoded piece of a model.

    Attributes:
        stored: name → spec and tensor (flat bytes if PyTorch has no such dtype).
        recipes: in the order in which a reader follows them.
        notes: for each site, the code that encodes it or the reason why none does; for reports.
    """

    stored: Mapping[str, tuple[TensorSpec, Tensor]] = field(default_factory=dict)
    recipes: tuple[Recipe, ...] = ()
    notes: tuple[dict[str, Any], ...] = ()

    def __add__(self, other: "Piece") -> "Piece":
        return Piece({**self.stored, **other.stored}, self.recipes + other.recipes, self.notes + other.notes)


def plain(tensors: Mapping[str, Tensor]) -> Piece:
    """A piece that stores the tensors unchanged."""
    return Piece({name: (TensorSpec.of(tensor), tensor) for name, tensor in tensors.items()})


def encoded(
    name: str,
    code: Code,
    label: str,
    tensors: Mapping[str, Tensor],
    makes: Mapping[str, TensorSpec],
    note: dict[str, Any] | None = None,
) -> Piece:
    """Encode tensors in a code.

    Args:
        name: of the code in `CODES`.
        code: encodes the tensors.
        label: the stored tensors are called `label.part`.
        tensors: name → tensor, in the code's order.
        makes: name → spec of each tensor that decoding makes.
        note: to be completed with the code and the number of corrections; None for no note.

    Raises:
        Declined: the code does not accept the tensors.
    """
    coded = code.encode(list(tensors.values()), list(makes.values()))
    takes = {part: f"{label}.{part}" for part in coded.parts}
    result = {"code": name} | ({"corrections": coded.corrected} if coded.corrected else {})
    return Piece(
        {takes[part]: (TensorSpec.of(tensor), tensor) for part, tensor in coded.parts.items()},
        (Recipe(name, takes, makes, coded.params),),
        () if note is None else (note | result,),
    )


def stage(entropy: str) -> str | None:
    """The code of the entropy stage that users call `entropy`; None for no stage.

    Raises:
        UsageError: there is no such stage.
    """
    code = {"auto": AUTO, "none": None}.get(entropy, entropy)
    if code is not None and not (code in CODES and CODES[code].exact):
        raise UsageError(f"`entropy` is {entropy!r}: choose one of {', '.join(ENTROPIES)}")
    return code


def staged(piece: Piece, code: str | None, used_names: Collection[str] = ()) -> Piece:
    """Encode each stored tensor of a piece with a bit-exact code, unless that saves nothing.

    Args:
        piece: the piece to encode.
        code: a key of `freebits.codecs.registry.CODES`; None leaves the piece as it is.
        used_names: names that the stored tensors must not get.
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
        takes = {part: _unused_name(f"{name}.{part}", used_names) for part in coded.parts}
        stored |= {takes[part]: (TensorSpec.of(stored_part), stored_part) for part, stored_part in coded.parts.items()}
        recipes.append(Recipe(code, takes, {name: spec}, coded.params))
    return Piece(stored, (*recipes, *piece.recipes), piece.notes)


def _unused_name(name: str, used_names: Collection[str]) -> str:
    while name in used_names:
        name += "_"
    return name
