"""Encode tensors of a model as pieces. A piece has tensors to store and the recipes that decode them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from freebits.codecs.base import Code, Declined
from freebits.codecs.delta import BASE, MESSAGE
from freebits.codecs.registry import CODES
from freebits.errors import UsageError
from freebits.execution.serialization import storable
from freebits.options import ENTROPIES
from freebits.packed.base import BaseTensor
from freebits.packed.recipe import Recipe
from freebits.types import TensorSpec

storable(TensorSpec)
storable(Recipe)

AUTO = "entropy"
"""The code that the entropy stage `auto` uses."""
DELTA = "delta"


@storable
@dataclass(frozen=True)
class Piece:
    """Some encoded tensors of a model.

    Attributes:
        stored: name → spec and tensor of each tensor to store. The tensor is flat bytes if PyTorch lacks its dtype.
        recipes: recipes, in the order in which a reader follows them.
        notes: notes for reports. Each names the code that encodes a site of the residual stream, or the reason why no
            code does.
        base: tensors of the base model that the recipes need: name that a recipe uses for the tensor → the tensor.
    """

    stored: Mapping[str, tuple[TensorSpec, Tensor]] = field(default_factory=dict)
    recipes: tuple[Recipe, ...] = ()
    notes: tuple[dict[str, Any], ...] = ()
    base: Mapping[str, BaseTensor] = field(default_factory=dict)

    def __add__(self, other: "Piece") -> "Piece":
        return Piece(
            {**self.stored, **other.stored},
            self.recipes + other.recipes,
            self.notes + other.notes,
            {**self.base, **other.base},
        )

    @property
    def n_bytes(self) -> int:
        """The number of bytes of the stored tensors."""
        return sum(spec.n_bytes for spec, _ in self.stored.values())


def plain(tensors: Mapping[str, Tensor]) -> Piece:
    """Return a piece that stores the tensors unchanged."""
    return Piece({name: (TensorSpec.of(tensor), tensor) for name, tensor in tensors.items()})


def encoded(
    name: str,
    code: Code,
    label: str,
    tensors: Mapping[str, Tensor],
    makes: Mapping[str, TensorSpec],
    note: dict[str, Any] | None = None,
) -> Piece:
    """Encode tensors with a code.

    Args:
        name: key of the code in `CODES`.
        code: the code.
        label: prefix of the stored names, which are `label.part` for each part of the code.
        tensors: name → tensor, in the order that the code expects.
        makes: name → spec of each tensor that decoding makes.
        note: note to complete with the code and the number of corrected values; None if the piece gets no note.

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
    """Return the code (a key of `CODES`) for the option `entropy`; None if tensors are not entropy-coded.

    Raises:
        UsageError: the option has no such value.
    """
    code = {"auto": AUTO, "none": None}.get(entropy, entropy)
    if code is not None and not (code in CODES and CODES[code].exact):
        raise UsageError(f"`entropy` is {entropy!r}: choose {' or '.join(ENTROPIES)}")
    return code


def staged(piece: Piece, code: str | None, used_names: Collection[str] = ()) -> Piece:
    """Encode each stored tensor of a piece with a bit-exact code if this saves bytes.

    Args:
        piece: the piece to encode.
        code: key of the code in `freebits.codecs.registry.CODES`; None leaves the piece unchanged.
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
        recipes.append(Recipe(code, takes, {name: spec}, coded.params).checked([tensor]))
    return Piece(stored, (*recipes, *piece.recipes), piece.notes, piece.base)


def relative(
    name: str, spec: TensorSpec, tensor: Tensor, base: BaseTensor, base_tensor: Tensor, used_names: Collection[str] = ()
) -> Piece:
    """Encode a tensor as its differences from a tensor of the base, bit for bit.

    Args:
        name: name of the tensor.
        spec: its spec.
        tensor: its value, which can be flat bytes.
        base: the tensor of the base.
        base_tensor: the value of that tensor.
        used_names: names that are already used. The recipe's new names for the stored tensor and for the tensor of the
            base must differ from them.

    Raises:
        Declined: the differences save no bytes.
    """
    coded = CODES[DELTA].encode([tensor, base_tensor], [spec])
    takes = {part: _unused_name(f"{name}.{part}", used_names) for part in (BASE, MESSAGE)}
    recipe = Recipe(DELTA, takes, {name: spec}, coded.params).checked([tensor])
    message = coded.parts[MESSAGE]
    return Piece({takes[MESSAGE]: (TensorSpec.of(message), message)}, (recipe,), base={takes[BASE]: base})


def _unused_name(name: str, used_names: Collection[str]) -> str:
    while name in used_names:
        name += "_"
    return name
