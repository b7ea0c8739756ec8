"""Which families freebits knows, as a page: written from the architecture table."""

from collections.abc import Iterable

from freebits.models.families import FAMILIES, REFUSALS, Family

_ABOUT = """# Families

*Written from the table in `architecture/families.py`; a test holds the two together.*

`freebits compress` and `quantize` take the types of [this table](model_types.md), `pack --codec none` any that
has weights in safetensors. Slicing, and the rotations that come with it, need to know where the residual stream runs: a
row of this table. Where several rows are of one model type, the config decides. How to add one: see CONTRIBUTING.md.

"""
_REFUSED = """
## Not sliced, with the reason

`compress` and `quantize` take these as well, and `pack --codec none` keeps them bit for bit.

"""


def families_page() -> str:
    """The page, in Markdown."""
    columns = ("model type", "when", "branches", "norms", "head", "what is read → written in a block")
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return _ABOUT + "\n".join([*rows, *map(_row, FAMILIES)]) + "\n" + _REFUSED + _refusals()


def _row(family: Family) -> str:
    when = ", ".join(f"`{need.key}` is `{need.value}`" for need in family.when)
    branches = [branch for sub in family.sublayers for branch in sub.branches]
    form = "side by side" if len(family.sublayers) < len(branches) else "one after another"
    norms = "LayerNorm" if family.centred else "RMS norm"
    head = "tied unless the config says else" if family.tied_by_default else "its own unless the config says else"
    transforms = "; ".join(f"{_names(branch.reads)} → {_names(branch.writes)}" for branch in branches)
    needs = "".join(f"; not with another `{need.key}`: {need.reason}" for need in family.requirements)
    return f"| `{family.model_type}` | {when} | {form}{needs} | {norms} | {head} | {transforms} |"


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _refusals() -> str:
    return "".join(f"- `{model_type}`: {reason}\n" for model_type, reason in REFUSALS.items())
