"""Recipes, which tell readers how to decode the model's tensors from the stored tensors."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import xxhash
from torch import Tensor

from freebits.codecs.base import Check
from freebits.codecs.registry import CODES
from freebits.codecs.sums import are_sums, check_sums, sums
from freebits.limits import RECIPE_STEPS, check_expansion
from freebits.types import TensorSpec, bytes_of


@dataclass(frozen=True)
class Recipe:
    """One step of decoding.

    Attributes:
        code: key of the code in `freebits.codecs.registry.CODES`.
        takes: name of each part of the code → name of the tensor with this part. The tensor is stored, or an earlier
            recipe makes it.
        makes: name → spec of each tensor that this step makes, in the order that the code defines.
        params: parameters of the code.
        digest: digest of the made tensors, if all machines decode the same values; see `Check`.
        sums: sums of the made tensors, if machines may round a few values differently; see `Check`.
    """

    code: str
    takes: Mapping[str, str]
    makes: Mapping[str, TensorSpec]
    params: Mapping[str, Any] = field(default_factory=dict)
    digest: str | None = None
    sums: Sequence[float] | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """The recipe as JSON. `makes` becomes a list, because JSON objects do not keep the order of their keys."""
        makes = [[name, str(spec)] for name, spec in self.makes.items()]
        facts = {"code": self.code, "takes": dict(self.takes), "makes": makes}
        optional = {"params": dict(self.params), "digest": self.digest, "sums": self.sums}
        return facts | {key: value for key, value in optional.items() if value}

    @classmethod
    def parse(cls, facts: Mapping[str, Any]) -> "Recipe":
        """Return the recipe that `facts` describes.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: `facts` does not describe a recipe.
        """
        makes = {name: TensorSpec.parse(spec) for name, spec in facts["makes"]}
        objects = isinstance(facts["takes"], dict) and isinstance(facts.get("params", {}), dict)
        names = (facts["code"], *facts["takes"].values(), *makes)
        if not objects or not all(isinstance(name, str) for name in names):
            raise ValueError("the takes or the params of a recipe are not an object, or a name in it is not a string")
        if not 0 < len(makes) == len(facts["makes"]):
            raise ValueError("a recipe makes no tensor, or makes a tensor twice")
        digest, sums = facts.get("digest"), facts.get("sums")
        if not (digest is None or isinstance(digest, str)) or not (sums is None or are_sums(sums)):
            raise ValueError("the digest or the sums of a recipe have the wrong type")
        return cls(facts["code"], dict(facts["takes"]), makes, dict(facts.get("params", {})), digest, sums)

    def parts(self) -> dict[str, TensorSpec]:
        """Return the spec of each part that the recipe takes.

        Raises:
            ValueError: the code is unknown, or does not accept the parameters.
        """
        if self.code not in CODES:
            raise ValueError(f"a recipe names the code {self.code!r}, which does not exist")
        if unknown := self.params.keys() - CODES[self.code].param_names:
            raise ValueError(f"the {self.code} code has no parameter {min(unknown)!r}")
        try:
            return CODES[self.code].parts(list(self.makes.values()), self.params)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"the parameters of a recipe do not fit the {self.code} code ({error!r})") from None

    def checked(self, tensors: Sequence[Tensor]) -> "Recipe":
        """Return the recipe with the digest or the sums of the tensors that it makes."""
        check = CODES[self.code].check
        if check is Check.DIGEST:
            return replace(self, digest=_digest(tensors))
        return replace(self, sums=sums(_values(tensors))) if check is Check.SUMS else self

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Compare made tensors with the digest or the sums.

        Raises:
            ValueError: the tensors do not match the digest or the sums.
        """
        if self.digest is not None and self.digest != _digest(tensors):
            raise ValueError("the decoded values do not have the digest of the packed ones")
        if self.sums is not None:
            check_sums(_values(tensors), self.sums)


def _digest(tensors: Sequence[Tensor]) -> str:
    hasher = xxhash.xxh3_128()
    for tensor in tensors:
        hasher.update(bytes_of(tensor).data)
    return hasher.hexdigest()


def _values(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def check_recipes(
    stored: Mapping[str, TensorSpec], recipes: Iterable[Recipe], base: Mapping[str, TensorSpec] | None = None
) -> dict[str, TensorSpec]:
    """Check recipes, and return the specs of the tensors that remain after the last one. No tensor data is needed.

    Args:
        stored: name → spec of each stored tensor, in file order.
        recipes: recipes, in the order in which a reader follows them. Each takes tensors that are stored or that an
            earlier recipe makes.
        base: name → spec of each tensor of the base that a recipe takes.

    Returns:
        The specs of the tensors that no recipe takes, including stored tensors. They are sorted by the place of the
        first stored tensor that each is made of.

    Raises:
        ValueError: a tensor is made twice, is taken twice, is missing, or does not have the spec that a recipe needs;
            or no recipe takes a tensor of the base; or a tensor needs too many recipes; or the recipes make far more
            bytes than are stored.
    """
    recipes, base = list(recipes), base or {}
    n_made_bytes = sum(spec.n_bytes for recipe in recipes for spec in recipe.makes.values())
    if shared_names := stored.keys() & base.keys():
        raise ValueError(f"{min(shared_names)} is both stored and a tensor of the base")
    remaining = {**stored, **base}
    check_expansion(sum(spec.n_bytes for spec in remaining.values()), n_made_bytes)
    depths = dict.fromkeys(remaining, 0)
    places = {name: number for number, name in enumerate(remaining)}
    for recipe in recipes:
        label = f"the recipe of {next(iter(recipe.makes), '?')}"
        parts = recipe.parts()
        if parts.keys() != recipe.takes.keys():
            raise ValueError(f"{label} does not take the parts of the {recipe.code} code")
        place, depth = len(places), 0
        for part, spec in parts.items():
            name = recipe.takes[part]
            if remaining.pop(name, None) != spec:
                raise ValueError(f"{label} takes {name}, which is missing, is already taken, or is not {spec}")
            place, depth = min(place, places[name]), max(depth, depths[name])
        if depth >= RECIPE_STEPS:
            raise ValueError(f"{label} needs more than {RECIPE_STEPS} recipes in a row")
        for name, spec in recipe.makes.items():
            if name in places:
                raise ValueError(f"{label} makes {name}, which already exists")
            remaining[name] = spec
            places[name], depths[name] = place, depth + 1
    if unused := remaining.keys() & base.keys():
        raise ValueError(f"no recipe takes {min(unused)} of the base")
    return dict(sorted(remaining.items(), key=lambda item: places[item[0]]))
