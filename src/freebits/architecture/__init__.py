"""What a model is: its residual stream, the tensors on it, and the sites where a rotation is free."""

from freebits.architecture.families import (
    FAMILIES,
    MODEL_TYPES,
    SLICED_PREFIX,
    Branch,
    Family,
    Heads,
    SublayerNames,
    dense_family,
    family_of,
)
from freebits.architecture.layout import RANKS, WIDTHS, Layout
from freebits.architecture.pairs import Pair, Span, pairs_of
from freebits.architecture.table import (
    EMBEDDINGS,
    HEAD,
    SHORTCUTS,
    Architecture,
    Axis,
    BoundBranch,
    Module,
    Part,
    Role,
    Sublayer,
    Weight,
)

__all__ = [
    "EMBEDDINGS",
    "FAMILIES",
    "HEAD",
    "MODEL_TYPES",
    "RANKS",
    "SHORTCUTS",
    "SLICED_PREFIX",
    "WIDTHS",
    "Architecture",
    "Axis",
    "BoundBranch",
    "Branch",
    "Family",
    "Heads",
    "Layout",
    "Module",
    "Pair",
    "Part",
    "Role",
    "Span",
    "Sublayer",
    "SublayerNames",
    "Weight",
    "dense_family",
    "family_of",
    "pairs_of",
]
