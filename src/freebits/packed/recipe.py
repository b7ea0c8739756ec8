"""Recipes: how a reader decodes the model's tensors from the stored tensors. Readers need nothing else."""

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
        takes: part of the code → name of the tensor, which is stored or made by an earlier recipe.
        makes: name → spec of each tensor that this step makes, in the code's order.
        params: other parameters of the code.
    """

    code: str
    takes: Mapping[str, str]
    makes: Mapping[str, TensorSpec]
    params: Mapping[str, Any] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, Any]:
        """The recipe as JSON. `makes` becomes a list, because JSON objects do not keep the order of their keys."""
        makes = [[name, str(spec)] for name, spec in self.makes.items()]
        facts = {"code": self.code, "takes": dict(self.takes), "makes": makes}
        return facts | ({"params": dict(self.params)} if self.params else {})

    @classmethod
    def parse(cls, facts: Mapping[str, Any]) -> "Recipe":
        """Return the recipe that `facts` describes.

        Raises:
            ValueError, TypeError, KeyError: this is not the JSON of a recipe.
        """
        makes = {name: TensorSpec.parse(spec) for name, spec in facts["makes"]}
        objects = isinstance(facts["takes"], dict) and isinstance(facts.get("params", {}), dict)
        names = (facts["code"], *facts["takes"].values(), *makes)
        if not objects or not all(isinstance(name, str) for name in names):
            raise ValueError("a recipe has a name that is not a text, or lacks an object")
        if not 0 < len(makes) == len(facts["makes"]):
            raise ValueError("a recipe makes no tensor, or makes one twice")
        return cls(facts["code"], dict(facts["takes"]), makes, dict(facts.get("params", {})))

    def parts(self) -> dict[str, TensorSpec]:
        """The spec of each part that the recipe takes.

        Raises:
            ValueError: the code is unknown, or does not accept the parameters.
        """
        if self.code not in CODES:
            raise ValueError(f"code {self.code!r} is not known")
        try:
            return CODES[self.code].parts(list(self.makes.values()), self.params)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"its parameters are not those of code {self.code} ({error!r})") from None


def check_recipes(stored: Mapping[str, TensorSpec], recipes: Iterable[Recipe]) -> dict[str, TensorSpec]:
    """Check the recipes and return the specs of the tensors that remain at the end. Nothing is read or allocated.

    Args:
        stored: the stored tensors, in file order.
        recipes: in written order. Each takes tensors that are stored or that an earlier recipe makes.

    Returns:
        The tensors that no recipe takes, including stored ones. They are in the order of the first stored tensor that
        each is made of.

    Raises:
        ValueError: a tensor is made twice, taken twice or missing, or has another spec than the recipe implies; or
            the recipes make more bytes than any packing makes from so few.
    """
    recipes = list(recipes)
    n_made_bytes = sum(spec.n_bytes for recipe in recipes for spec in recipe.makes.values())
    check_expansion(sum(spec.n_bytes for spec in stored.values()), n_made_bytes)
    remaining = dict(stored)
    depths = dict.fromkeys(stored, 0)
    places = {name: number for number, name in enumerate(stored)}
    for recipe in recipes:
        label = f"the recipe of {next(iter(recipe.makes), '?')}"
        parts = recipe.parts()
        if parts.keys() != recipe.takes.keys():
            raise ValueError(f"{label} takes other parts than code {recipe.code} has")
        place, depth = len(places), 0
        for part, spec in parts.items():
            name = recipe.takes[part]
            if remaining.pop(name, None) != spec:
                raise ValueError(f"{label} takes {name}, which is missing, taken already, or not {spec}")
            place, depth = min(place, places[name]), max(depth, depths[name])
        if depth >= RECIPE_STEPS:
            raise ValueError(f"{label} is one of more than {RECIPE_STEPS} steps")
        for name, spec in recipe.makes.items():
            if name in places:
                raise ValueError(f"{label} makes {name}, which exists already")
            remaining[name] = spec
            places[name], depths[name] = place, depth + 1
    return dict(sorted(remaining.items(), key=lambda item: places[item[0]]))
