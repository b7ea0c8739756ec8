"""Recipes: how stored tensors become the model's. The only truth for reading."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from freebits.codecs.registry import CODES
from freebits.limits import RECIPE_STEPS, check_expansion
from freebits.types import TensorSpec


@dataclass(frozen=True)
class Recipe:
    """One step of decoding.

    Attributes:
        code: a key of `freebits.codecs.registry.CODES`.
        takes: the code's part → the tensor it takes, stored or made by a recipe before.
        makes: the tensors that it makes, in the code's order.
        params: what the code needs besides.
    """

    code: str
    takes: Mapping[str, str]
    makes: Mapping[str, TensorSpec]
    params: Mapping[str, Any] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, Any]:
        """The recipe as JSON, which does not keep the order of an object's keys."""
        makes = [[name, str(spec)] for name, spec in self.makes.items()]
        told = {"code": self.code, "takes": dict(self.takes), "makes": makes}
        return told | ({"params": dict(self.params)} if self.params else {})

    @classmethod
    def parse(cls, facts: Mapping[str, Any]) -> "Recipe":
        """The inverse of `facts`.

        Raises:
            ValueError, TypeError, KeyError: it is none.
        """
        makes = {name: TensorSpec.parse(spec) for name, spec in facts["makes"]}
        objects = isinstance(facts["takes"], dict) and isinstance(facts.get("params", {}), dict)
        names = (facts["code"], *facts["takes"].values(), *makes)
        if not objects or not all(isinstance(name, str) for name in names) or not 0 < len(makes) == len(facts["makes"]):
            raise ValueError("names that are none, one that is made twice, or nothing that is made")
        return cls(facts["code"], dict(facts["takes"]), makes, dict(facts.get("params", {})))

    def parts(self) -> dict[str, TensorSpec]:
        """The kinds of what it takes, by part.

        Raises:
            ValueError: its code is not known, or there are no such parts.
        """
        if self.code not in CODES:
            raise ValueError(f"code {self.code!r} is not known")
        try:
            return CODES[self.code].parts(list(self.makes.values()), self.params)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"its parameters are not those of code {self.code} ({error!r})") from None


def made_of(stored: Mapping[str, TensorSpec], recipes: Iterable[Recipe]) -> dict[str, TensorSpec]:
    """The tensors that a folder holds, those without recipe as they are stored. Nothing is read or allocated.

    Args:
        stored: the stored tensors, in their order.
        recipes: in written order: each takes what is stored or was made before it.

    Returns:
        The tensors that no recipe takes, in the order in which the first thing they are made of is stored.

    Raises:
        ValueError: a tensor is made twice, or taken twice, or not there to be taken; or it is not of the kind that
            the recipe implies; or more is made than any packing leaves to be made of so few bytes.
    """
    recipes = list(recipes)
    made = sum(spec.n_bytes for recipe in recipes for spec in recipe.makes.values())
    check_expansion(sum(spec.n_bytes for spec in stored.values()), made)
    left = dict(stored)
    depth = dict.fromkeys(stored, 0)
    place = {name: number for number, name in enumerate(stored)}
    for recipe in recipes:
        label = f"the recipe of {next(iter(recipe.makes), '?')}"
        parts = recipe.parts()
        if parts.keys() != recipe.takes.keys():
            raise ValueError(f"{label} takes other parts than code {recipe.code} has")
        first, deepest = len(place), 0
        for part, spec in parts.items():
            name = recipe.takes[part]
            if left.pop(name, None) != spec:
                raise ValueError(f"{label} takes {name}, which is missing, taken already, or not {spec}")
            first, deepest = min(first, place[name]), max(deepest, depth[name])
        if deepest >= RECIPE_STEPS:
            raise ValueError(f"{label} is one of more than {RECIPE_STEPS} steps")
        for name, spec in recipe.makes.items():
            if name in place:
                raise ValueError(f"{label} makes {name}, which is there already")
            left[name] = spec
            place[name], depth[name] = first, deepest + 1
    return dict(sorted(left.items(), key=lambda item: place[item[0]]))
