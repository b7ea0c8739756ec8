"""Generate `docs/families.md` from the table of families."""

from collections.abc import Iterable

from freebits.models.families import FAMILIES, REFUSALS, Family

_ABOUT = """# Families

*Generated from `models/families.py` by `python -m benchmarks.families`; a test compares the two.*

`freebits compress` and `quantize` take the types in [this table](model_types.md). `pack --codec none` takes any model
with safetensors weights. Slicing and rotation need a row in the table below, which says which layers read and write the
residual stream. If a model type has several rows, the config of the model decides which row applies. CONTRIBUTING.md
explains how to add a row.

"""
_REFUSED = """
## Types that cannot be sliced

`compress`, `quantize` and `pack --codec none` take these types too.

"""


def families_page() -> str:
    """Return the page in Markdown."""
    columns = ("model type", "when", "branches", "norms", "head", "layers that read → write the stream")
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return _ABOUT + "\n".join([*rows, *map(_row, FAMILIES)]) + "\n" + _REFUSED + _refusals()


def _row(family: Family) -> str:
    when = ", ".join(f"`{need.key}` is `{need.value}`" for need in family.when)
    branches = [branch for sub in family.sublayers for branch in sub.branches]
    order = "parallel" if len(family.sublayers) < len(branches) else "sequential"
    norms = "LayerNorm" if family.centred else "RMS norm"
    head = "tied by default" if family.tied_by_default else "untied by default"
    branch_names = "; ".join(f"{_names(branch.reads)} → {_names(branch.writes)}" for branch in branches)
    needs = "".join(
        f"; refused if `{need.key}` is not `{need.same_as or need.value}`, because {need.reason}"
        for need in family.requirements
    )
    return f"| `{family.model_type}` | {when} | {order}{needs} | {norms} | {head} | {branch_names} |"


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _refusals() -> str:
    return "".join(f"- `{model_type}`: {reason}\n" for model_type, reason in REFUSALS.items())
